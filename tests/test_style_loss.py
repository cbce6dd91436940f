"""Style Gram: the loss against direct computation on networks of open_clip and torchvision with random weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import folder_paths
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sphereguide.losses.style import StyleGram, gram, weighted
from sphereguide.models import clip_model
from sphereguide.models.decoder import Decoder
from sphereguide.nodes.style import LoadVGG, StyleGramLoss
from sphereguide.samplers.autograd import differentiable
from torchvision.models.vgg import cfgs, make_layers

open_clip = pytest.importorskip("open_clip")

GATYS = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
TEXT = {"context_length": 8, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 4, "head_width": 16}
RESNET = {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "", "image_size": 224}


def placed(name):
    """The folder `models/<name>` of this run, which is a temporary one."""
    return Path(folder_paths.models_dir) / name


def load_clip(vision):
    """OPEN_CLIP_MODEL with that image tower, and the model of open_clip that was saved."""
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    model = open_clip.CLIP(**config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    folder = placed("open_clip") / "tiny"
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        loaded = clip_model.load("tiny/")
    shutil.rmtree(folder)
    return loaded, model


@pytest.fixture(scope="module")
def vit():
    clip_model.entries()  # registers the folder
    torch.manual_seed(0)
    return load_clip(VIT)


@pytest.fixture(scope="module")
def vgg():
    """VGG_FEATURES from a file as torchvision's, and the network of torchvision that was saved."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["E"], batch_norm=False).eval()
    weights = {f"features.{name}": weight for name, weight in layers.state_dict().items()}
    path = placed("vgg") / "vgg19-dcbb9e9d.pth"
    torch.save({**weights, "classifier.0.weight": torch.zeros(4096, 2)}, path)
    with torch.inference_mode():
        (loaded,) = LoadVGG().load(path.name)
    path.unlink()
    return loaded, layers


def make(style, clip=None, vgg=None, **changes):
    settings = {"clip_layers": "3", "vgg_layers": ", ".join(GATYS), "vgg_size": 32, **changes}
    with torch.inference_mode():
        return StyleGramLoss().make(style.movedim(1, -1), open_clip_model=clip, vgg=vgg, **settings)[0]


def images(batch, height=48, width=64, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def gradient(loss, estimate):
    with differentiable(loss) as recording, recording():
        variable = estimate.detach().clone().requires_grad_()
        value = loss(variable)
        return value.detach(), torch.autograd.grad(value.sum(), variable)[0]


@torch.no_grad()
def vit_gram(model, image, block):
    """The Gram matrix of what leaves a block of the saved model, by hand."""
    image = F.interpolate(image[None], size=(32, 32), mode="bicubic", antialias=True)
    image = (image - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    seen = []
    handle = model.visual.transformer.resblocks[block - 1].register_forward_hook(lambda *args: seen.append(args[2]))
    model.visual(image)
    handle.remove()
    features = seen[0][0, 1:]  # without the class token
    assert features.shape == (16, 48)
    return features.T @ features


@torch.no_grad()
def vgg_gram(layers, image, index):
    """The Gram matrix of what leaves entry `index` of torchvision's layers, by hand."""
    image = F.interpolate(image[None], size=(32, 43), mode="bilinear", antialias=True)
    image = (image - torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).reshape(3, 1, 1)
    features = layers[: index + 1](image)[0].flatten(1)
    return features @ features.T


def distance(a, b):
    return (a - b).norm() / b.norm()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_default_is_the_relative_frobenius_distance_at_the_third_block(vit):
    clip, model = vit
    style, estimate = images(1, 40, 40, seed=1), images(3)
    assert StyleGramLoss.INPUT_TYPES()["required"]["clip_layers"][1]["default"] == "3"
    expected = [distance(vit_gram(model, image, 3), vit_gram(model, style[0], 3)) for image in estimate]
    close(make(style, clip)(estimate), torch.stack(expected))


def test_its_direction_is_that_of_the_papers_undivided_distance(vit):
    clip, model = vit
    style, estimate = images(1, 32, 32, seed=1), images(1, 32, 32)
    _, ours = gradient(make(style, clip), estimate)
    target = vit_gram(model, style[0], 3)
    variable = estimate.clone().requires_grad_()
    vit_gram.__wrapped__(model, variable[0], 3).sub(target).norm().backward()
    assert F.cosine_similarity(ours.flatten(), variable.grad.flatten(), dim=0) > 1 - 1e-5


def test_blocks_are_weighted(vit):
    clip, model = vit
    style, estimate = images(1, seed=1), images(1)
    parts = [distance(vit_gram(model, estimate[0], block), vit_gram(model, style[0], block)) for block in (4, 1)]
    close(make(style, clip, clip_layers="4:3, 1")(estimate), (0.75 * parts[0] + 0.25 * parts[1])[None])


def test_vggs_layers_are_weighted(vgg):
    loaded, layers = vgg
    style, estimate = images(1, seed=1), images(2)
    for i in range(2):
        parts = [distance(vgg_gram(layers, estimate[i], index), vgg_gram(layers, style[0], index)) for index in (1, 5)]
        expected = (parts[0] + 0.5 * parts[1]) / 1.5
        close(make(style, vgg=loaded, vgg_layers="relu1_1, conv2_1:0.5")(estimate)[i], expected)


def test_the_names_of_vggs_layers_are_those_of_the_literature(vgg):
    loaded, layers = vgg
    names = loaded.network.names
    assert [names.index(name) for name in GATYS] == [1, 6, 11, 20, 29]
    assert [names.index(name) for name in ("conv1_1", "conv5_4", "pool1", "pool5")] == [0, 34, 4, 36]
    with torch.no_grad():
        x = images(1, 32, 32)
        expected = layers[:1]((x - loaded.network.mean) / loaded.network.std)
        first, second = loaded.network(x, ["conv1_1", "relu1_1"])
    torch.testing.assert_close(first, expected)  # not overwritten by the relu behind it
    torch.testing.assert_close(second, expected.relu())


def test_the_gram_matrices_of_several_styles_are_averaged(vit):
    clip, model = vit
    style, estimate = images(3, seed=1), images(2)
    mean = torch.stack([vit_gram(model, image, 3) for image in style]).mean(0)
    expected = [distance(vit_gram(model, image, 3), mean) for image in estimate]
    close(make(style, clip)(estimate), torch.stack(expected))


def test_a_texture_has_one_gram_matrix_at_any_size(vgg):
    loaded, _ = vgg
    tile = images(1, 64, 64)
    small, large = (gram(loaded.network(tile.repeat(1, 1, n, n), ["relu1_1"])[0].flatten(2)) for n in (1, 4))
    assert distance(small, large) < 0.02


def test_a_strip_of_a_picture_is_refused(vgg):
    """One pixel high, it would be scaled to a terabyte."""
    loaded, _ = vgg
    make(images(1, 4, 64), vgg=loaded)
    with pytest.raises(ValueError, match=r"^Style Gram Loss: a picture of 16384×1 pixels is too long and narrow"):
        make(images(1, 1, 16384), vgg=loaded)


def test_half_precision_does_not_overflow_the_gram_matrix():
    features = torch.full((1, 2, 100_000), 10.0, dtype=torch.float16)
    torch.testing.assert_close(gram(features), torch.full((1, 2, 2), 100.0))


@pytest.mark.parametrize("network", ["vit", "vgg"])
def test_the_style_itself_costs_nothing_and_has_a_gradient_of_zero(network, request):
    loaded, _ = request.getfixturevalue(network)
    style = images(1)
    value, found = gradient(make(style, **{"clip" if network == "vit" else "vgg": loaded}), style)
    assert torch.equal(value, torch.zeros(1))
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("network", ["vit", "vgg"])
def test_a_sample_has_the_loss_and_gradient_that_it_has_alone(network, request):
    loaded, _ = request.getfixturevalue(network)
    loss, estimates = make(images(2, seed=1), **{"clip" if network == "vit" else "vgg": loaded}), images(3)
    together = gradient(loss, estimates)
    for i in range(3):
        value, found = gradient(loss, estimates[i : i + 1])
        torch.testing.assert_close(value[0], together[0][i], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found[0], together[1][i], atol=1e-7, rtol=1e-3)
        assert (found != 0).float().mean() > 0.9


@pytest.mark.parametrize("network", ["vit", "vgg"])
def test_the_gradient_is_that_of_finite_differences(network, request):
    loaded, _ = request.getfixturevalue(network)
    loss, estimate = make(images(1, seed=1), **{"clip" if network == "vit" else "vgg": loaded}), images(2)
    _, found = gradient(loss, estimate)
    direction = F.normalize(found.flatten(1), dim=1).view_as(found)  # the steepest: float32 leaves few digits
    numeric = (loss(estimate + 0.01 * direction) - loss(estimate - 0.01 * direction)) / 0.02
    torch.testing.assert_close(numeric, found.flatten(1).norm(dim=1), rtol=0.03, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_judged_in_the_networks(vit, dtype):
    loss, estimate = make(images(1, seed=1), vit[0]), images(2).to(dtype)
    value, found = gradient(loss, estimate)
    assert value.dtype == torch.float32 and found.dtype == dtype
    torch.testing.assert_close(value, loss(estimate.float()))
    assert found.isfinite().all() and (found != 0).any()


@pytest.mark.parametrize("network", ["vit", "vgg"])
def test_the_gradient_goes_through_the_vae(network, request):
    loaded, _ = request.getfixturevalue(network)
    with torch.inference_mode():
        decoder = Decoder(tiny_models.TinyVAE())
    loss = make(images(1, seed=1), **{"clip" if network == "vit" else "vgg": loaded})
    with differentiable(loss, decoder.module) as recording, recording():
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (found,) = torch.autograd.grad(loss(decoder(latents)).sum(), latents)
    assert found.isfinite().all() and (found.flatten(1).norm(dim=1) > 0).all()


def test_the_network_is_listed_for_the_sampler_to_load(vit, vgg):
    loss = make(images(1), vit[0])
    assert loss.patchers == (vit[0].image,)
    assert vit[0].image.model in set(loss.modules())
    loss = make(images(1), vgg=vgg[0])
    assert loss.patchers == (vgg[0].patcher,)
    assert vgg[0].patcher.model in set(loss.modules())


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_are_names_with_optional_weights():
    assert weighted("relu1_1, relu2_1:0.5") == [("relu1_1", 1.0), ("relu2_1", 0.5)]
    assert weighted(" 3 ,") == [("3", 1.0)]


@pytest.mark.parametrize("text", ["3:", "3:much", "3:0", "3:-1", "3:nan", "3:inf", ":1"])
def test_a_weight_that_is_none_is_shown(text):
    with pytest.raises(ValueError, match=f"'{text}' is no layer. Write its name, or name:weight"):
        weighted(f"1, {text}")


def test_layers_that_the_network_lacks_are_named_with_those_that_it_has(vit, vgg):
    for text in ("0", "5", "-1", "relu1_1"):
        with pytest.raises(ValueError, match=rf"clip_layers: this network has no layer '{text}'. It has 1, 2, 3, 4\."):
            make(images(1), vit[0], clip_layers=text)
    with pytest.raises(ValueError, match=r"vgg_layers: this network has no layer 'relu6_1'. It has conv1_1, relu1_1, "):
        make(images(1), vgg=vgg[0], vgg_layers="relu1_1, relu6_1")
    with pytest.raises(ValueError, match=r"Style Gram Loss: clip_layers: no layer is named"):
        make(images(1), vit[0], clip_layers=" , ")


# -- nodes -------------------------------------------------------------------------------------------------------------


def test_one_network_is_asked_for(vit, vgg):
    with pytest.raises(ValueError, match=r"Style Gram Loss: neither of open_clip_model and vgg connected"):
        make(images(1))
    with pytest.raises(ValueError, match=r"Style Gram Loss: both of open_clip_model and vgg connected"):
        make(images(1), vit[0], vgg[0])


def test_an_image_tower_of_another_kind_is_refused():
    clip, _ = load_clip(RESNET)
    with pytest.raises(ValueError, match=r"the image tower of tiny/ is no vision transformer.*connect vgg"):
        make(images(1), clip)


def test_a_vision_transformer_of_timm_has_blocks_too():
    clip, model = load_clip(TIMM)
    style, estimate = images(1, seed=1), images(1)
    seen = []
    model.visual.trunk.blocks[2].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model.visual(clip.tower.prepare(torch.cat([style, estimate])))
    a, b = seen[0][:, 1:].mT @ seen[0][:, 1:]
    close(make(style, clip)(estimate), distance(b, a)[None])


def test_the_list_of_vggs_says_when_it_is_empty():
    assert LoadVGG.INPUT_TYPES()["required"]["name"][0] == ["models/vgg is empty"]
    with pytest.raises(FileNotFoundError, match=r"models/vgg .*https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"):
        LoadVGG().load("models/vgg is empty")


def test_weights_of_another_network_are_refused():
    path = placed("vgg") / "vgg16.safetensors"
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    try:
        with pytest.raises(ValueError, match=r"Load VGG Features: .*vgg16.safetensors does not fit .*VGG19"):
            LoadVGG().load(path.name)
    finally:
        path.unlink()


def test_loading_leaves_the_random_numbers_of_the_workflow_alone(vgg):
    _, layers = vgg
    path = placed("vgg") / "vgg19.safetensors"
    save_file({f"features.{name}": weight for name, weight in layers.state_dict().items()}, path)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    LoadVGG().load(path.name)
    path.unlink()
    assert torch.equal(torch.rand(1), expected)


def test_without_torchvision_the_loader_says_how_to_get_it(monkeypatch):
    path = placed("vgg") / "vgg19.safetensors"
    path.touch()
    monkeypatch.setitem(sys.modules, "torchvision.models.vgg", None)
    with pytest.raises(ImportError, match=r"Load VGG Features needs .*pip install --no-deps torchvision"):
        LoadVGG().load(path.name)
    path.unlink()


def test_a_loss_keeps_no_style_image():
    """Encoded when it is made: what is kept is as large as the Gram matrices."""

    class Colours(torch.nn.Module):
        def forward(self, images):
            return [images.flatten(2)]

    loss = StyleGram(Colours(), [1.0], images(2))
    assert {name: tuple(buffer.shape) for name, buffer in loss.named_buffers()} == {"style_0": (1, 3, 3)}
