"""Segmentation: the loss against direct computation and the libraries' own, its nodes, and the loader's real files."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import folder_paths
import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
import torchvision
import transformers
from bootstrap import ROOT
from safetensors.torch import save_file
from sphereguide.losses.segmentation import UNLABELLED, Segmentation, from_colors, layered
from sphereguide.models.decoder import Decoder
from sphereguide.nodes import segmentation as nodes
from sphereguide.nodes.segmentation import LoadSegmentationModel, SegmentationLoss, SegmentationTarget
from sphereguide.samplers.autograd import differentiable

LABELS = ["background", "skin", "hair", "eyes"]
PALETTE = ["#000000", "#f0be96", "#784628", "#ffffff"]
FACE = "segformer/"
VOC = "lraspp_mobilenet_v3_large-small.pth"


def segformer(**changes):
    torch.manual_seed(0)
    settings = {
        "hidden_sizes": [8, 8, 16, 16],
        "num_attention_heads": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 16,
        "id2label": dict(enumerate(LABELS)),
        **changes,
    }
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**settings))


def lraspp(classes):
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes
    )
    tiny_models.initialise(network)  # torchvision's own random weights give the same logits for all images
    return network.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models/segmentation with a SegFormer folder and a file of torchvision's."""
    folder = tmp_path_factory.mktemp("segmentation")
    segformer(palette=PALETTE).save_pretrained(folder / FACE)
    transformers.SegformerImageProcessor(size=64, image_mean=[0.4, 0.5, 0.6]).save_pretrained(folder / FACE)
    torch.save(lraspp(21).state_dict(), folder / VOC)
    return folder


@pytest.fixture(autouse=True)
def registered(models, monkeypatch):
    register(models, monkeypatch)


def register(folder, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_folder_paths", {"segmentation": [str(folder)]}.__getitem__)


def load(name, architecture=nodes.BY_NAME):
    with torch.inference_mode():
        return LoadSegmentationModel().load(name, architecture)


def make(model, **inputs):
    settings = {"class_name": "", "colors": "", "tolerance": 8, "unlabelled": "", **inputs}
    with torch.inference_mode():
        settings = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in settings.items()}
        return SegmentationLoss().make(model, **settings)[0]


def evaluated(loss, images):
    """The loss and its gradient, as a sampler takes them."""
    with differentiable(loss) as recording, recording():
        images = images.clone().requires_grad_()
        value = loss(images)
        return value.detach(), torch.autograd.grad(value.sum(), images)[0]


def pictures(*size, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def random_classes(*size, classes=4, seed=0):
    return torch.randint(classes, size, generator=torch.Generator().manual_seed(seed))


def painted(classes, palette=PALETTE):
    """Classes `[R, H, W]` as an IMAGE."""
    return torch.tensor([list(bytes.fromhex(color[1:])) for color in palette])[classes] / 255


class Colors(torch.nn.Module):
    """Stands for a network: the channels of the image are the logits."""

    def forward(self, images):
        return images * 5


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_over_labelled_pixels_by_their_weight():
    images = pictures(2, 3, 4, 6)
    target = random_classes(2, 4, 6, classes=3)
    target[0, :2] = UNLABELLED
    region = pictures(1, 1, 4, 6, seed=1)
    expected = []
    for i in range(2):
        total = weights = 0.0
        for row in range(4):
            for column in range(6):
                if (label := target[i, row, column].item()) != UNLABELLED:
                    p = (5 * images[i, :, row, column]).softmax(0)[label]
                    total += region[0, 0, row, column] * -p.log()
                    weights += region[0, 0, row, column]
        expected.append(total / weights)
    torch.testing.assert_close(Segmentation(Colors(), target, region)(images), torch.stack(expected))


def test_segformer_loss_is_the_one_it_was_trained_by():
    model, _ = load(FACE)
    images, classes = pictures(1, 3, 64, 64), random_classes(1, 64, 64)
    labels = classes.clone()
    labels[:, :9] = 255  # what SegFormer ignores
    color_map = painted(classes)
    color_map[:, :9] = 0.5
    theirs = transformers.AutoModelForSemanticSegmentation.from_pretrained(
        nodes.path_of("segmentation", FACE, ""), semantic_loss_ignore_index=255
    )
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    normalised = (images - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / std
    expected = theirs.eval()(pixel_values=normalised, labels=labels).loss.detach()
    torch.testing.assert_close(make(model, color_map=color_map)(images), expected[None], rtol=1e-5, atol=1e-6)


def test_torchvision_loss_is_that_of_its_own_output():
    model, _ = load(VOC)
    images = pictures(1, 3, 520, 520)
    classes = random_classes(1, 520, 520, classes=21)
    network = lraspp(21)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = network((images - mean[:, None, None]) / std[:, None, None])["out"]
    expected = F.cross_entropy(logits, classes)
    assert logits.std(dim=(2, 3)).max() > 0.01
    color_map = painted(classes, model.network.palette)
    torch.testing.assert_close(make(model, color_map=color_map)(images), expected[None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [FACE, VOC])
def test_a_sample_decides_its_own_loss_and_gradient(name):
    model, _ = load(name)
    color_map = painted(random_classes(3, 40, 60), model.network.palette)
    images = pictures(3, 3, 40, 60)
    value, gradient = evaluated(make(model, color_map=color_map), images)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    for i in range(3):
        alone = evaluated(make(model, color_map=color_map[i : i + 1]), images[i : i + 1])
        torch.testing.assert_close(value[i : i + 1], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient[i : i + 1], alone[1], rtol=1e-3, atol=1e-3 * float(alone[1].abs().max()))
    assert value.unique().numel() == 3


def test_targets_and_regions_may_be_fewer_or_more_than_samples():
    target = random_classes(2, 4, 4, classes=3)
    region = pictures(3, 1, 4, 4, seed=1)
    images = pictures(5, 3, 4, 4)
    together = Segmentation(Colors(), target, region)(images)
    alone = [Segmentation(Colors(), target[i % 2, None], region[i % 3, None])(images[i, None]) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(Segmentation(Colors(), target, region)(images[:1]), together[:1])


def test_gradients_reach_the_latent_through_resize_and_vae():
    model, _ = load(FACE)
    with torch.inference_mode():
        decode = Decoder(tiny_models.TinyVAE())
    loss = make(model, mask=torch.ones(1, 8, 8), class_name="hair")
    with differentiable(loss, decode.module) as recording, recording(lenient=True):
        latent = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(decode(latent)).sum(), latent)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_the_gradient_leads_to_what_is_asked_for():
    model, _ = load(FACE)
    loss = make(model, mask=torch.ones(1, 8, 8), class_name="hair")
    images = pictures(1, 3, 32, 48)
    value, gradient = evaluated(loss, images)
    assert loss(images - 0.1 * gradient / gradient.square().mean().sqrt()) < value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_judged_in_float32(dtype):
    model, _ = load(FACE)
    loss = make(model, mask=torch.ones(1, 8, 8), class_name="hair")
    images = pictures(2, 3, 40, 24).to(dtype)
    value, gradient = evaluated(loss, images)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, loss(images.float()))
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_strip_of_a_picture_is_refused():
    """One pixel high, it would be scaled to a terabyte."""
    network = load(FACE)[0].network
    assert network.input_size(16, 256) == (64, 1024)
    with pytest.raises(ValueError, match=r"^Segmentation Loss: a picture of 16384×1 pixels is too long and narrow"):
        network.input_size(1, 16384)


def test_the_network_sees_the_image_at_its_own_scale_and_the_images_aspect():
    network = load(FACE)[0].network
    assert network.input_size(128, 128) == (64, 64)
    assert network.input_size(1216, 832) == (96, 64)
    assert network.input_size(30, 120) == (64, 256)
    assert load(VOC)[0].network.input_size(512, 768) == (520, 780)
    seen = []
    network.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert network(pictures(1, 3, 96, 48)).shape == (1, 4, 128, 64)
    assert seen == [(1, 3, 128, 64)]


def test_a_target_too_small_for_what_the_network_sees_is_refused():
    model, _ = load(FACE)
    mask = torch.zeros(1, 512, 512)
    mask[:, 0, 0] = 1
    loss = make(model, mask=mask, class_name="hair")
    with pytest.raises(ValueError, match=r"64×64 pixels that the network sees.*Make its areas larger"):
        loss(pictures(1, 3, 64, 64))


def test_the_network_is_the_one_under_model_management():
    model, _ = load(FACE)
    loss = make(model, mask=torch.ones(1, 8, 8), class_name="hair")
    assert loss.patchers == (model.patcher,)
    assert loss.network is model.patcher.model and not loss.network.training
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert loss.space == "image"


# -- targets -----------------------------------------------------------------------------------------------------------


def classes_of(model, **inputs):
    return make(model, **inputs).target


def test_colours_mean_the_classes_that_the_text_gives_them():
    model, _ = load(FACE)
    classes = random_classes(2, 8, 12)
    text = "skin=#f0be96, HAIR = 784628;\n back_ground=#000000\r\neyes=#FFFFFF\n"
    assert torch.equal(classes_of(model, color_map=painted(classes), colors=text), classes)
    some = classes_of(model, color_map=painted(classes), colors="skin=#f0be96,2=#784628")
    assert torch.equal(some, torch.where((classes == 1) | (classes == 2), classes, UNLABELLED))


def test_without_text_the_colours_are_those_of_the_data_set():
    classes = random_classes(1, 8, 12)
    assert torch.equal(classes_of(load(FACE)[0], color_map=painted(classes)), classes)


def test_a_class_may_have_several_colours():
    model, _ = load(FACE)
    classes = random_classes(1, 8, 12)
    found = classes_of(model, color_map=painted(classes), colors="hair=#784628, hair=#f0be96, eyes=#ffffff, 0=#000000")
    assert torch.equal(found, torch.where(classes == 1, 2, classes))


def test_a_pixel_has_the_nearest_colour_within_the_tolerance():
    colors = [(0, "#000000"), (1, "#0a0a0a")]
    grey = torch.tensor([0.0, 4.0, 6.0, 10.0, 14.0, 15.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6) / 255
    assert from_colors(grey, colors, 4).tolist() == [[[0, 0, 1, 1, 1, UNLABELLED]]]
    assert from_colors(grey, colors, 0).tolist() == [[[0, UNLABELLED, UNLABELLED, 1, UNLABELLED, UNLABELLED]]]


def test_a_map_in_none_of_the_colours_is_refused_with_its_own():
    model, _ = load(FACE)
    color_map = torch.full((1, 8, 8, 3), 200 / 255)
    with pytest.raises(ValueError, match=r"no pixel of color_map .* #f0be96.* commonest are #c8c8c8"):
        make(model, color_map=color_map, colors="skin=#f0be96")


def test_a_network_without_known_colours_asks_for_them(tmp_path, monkeypatch):
    segformer().save_pretrained(tmp_path / "plain")
    register(tmp_path, monkeypatch)
    model, labels = load("plain/")
    assert labels == "\n".join(LABELS)
    with pytest.raises(ValueError, match=r"colors is empty.*background=#f0be96"):
        make(model, color_map=torch.zeros(1, 8, 8, 3))


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        ("skin=red", r"'skin=red' in colors is not of the form skin=#f0be96"),
        ("skin=#f0be96, rubbish", r"'rubbish' in colors is not of the form"),
        ("skin=#f0be9600", r"is not of the form"),
        ("skin=#f0be96, hair=#F0BE96", r"gives #f0be96 to both skin and hair"),
        ("hiar=#f0be96", r"no class 'hiar'\. Did you mean hair.*background, skin, hair, eyes"),
    ],
)
def test_colour_texts_that_make_no_sense_are_refused(colors, message):
    with pytest.raises(ValueError, match=message):
        make(load(FACE)[0], color_map=torch.zeros(1, 8, 8, 3), colors=colors)


def test_later_layers_lie_over_earlier_ones():
    model, _ = load(FACE)
    classes = torch.zeros(1, 8, 8, dtype=torch.long)
    left, top, corner = torch.zeros(3, 1, 8, 8)
    left[..., :4], top[:, :4], corner[:, :2, :2] = 1, 0.6, 1
    (target,) = SegmentationTarget().add(left, "skin")
    (target,) = SegmentationTarget().add(top, "Hair", target)
    found = classes_of(model, color_map=painted(classes), target=target, mask=corner, class_name="eyes")
    classes[..., :4] = 1
    classes[:, :4] = 2
    classes[:, :2, :2] = 3
    assert torch.equal(found, classes)


def test_a_mask_alone_leaves_the_rest_free_or_to_another_class():
    model, _ = load(FACE)
    mask = torch.zeros(1, 8, 8)
    mask[:, :3] = 1
    free = classes_of(model, mask=mask, class_name="hair")
    assert (free[:, :3] == 2).all() and (free[:, 3:] == UNLABELLED).all()
    assert (classes_of(model, mask=mask, class_name="hair", unlabelled="Background")[:, 3:] == 0).all()
    assert (classes_of(model, mask=torch.zeros(1, 8, 8), class_name="hair", unlabelled="eyes") == 3).all()


def test_a_single_mask_without_batch_dimension_is_a_mask():
    assert classes_of(load(FACE)[0], mask=torch.ones(8, 8), class_name="hair").shape == (1, 8, 8)


def test_layers_of_different_sizes_meet_at_the_largest():
    small, large = torch.tensor([[[0, 1], [2, 3]]]), torch.full((3, 4, 4), UNLABELLED)
    large[1, 0, 0] = 3
    found = layered([small, large])
    assert found.shape == (3, 4, 4)
    assert torch.equal(found[0], small[0].repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert found[1, 0, 0] == 3 and torch.equal(found[2], found[0])


def test_the_region_is_where_the_loss_looks():
    model, _ = load(FACE)
    classes, images = random_classes(1, 64, 64), pictures(1, 3, 64, 64)
    region = torch.zeros(1, 64, 64)
    region[:, :, :32] = 1
    outside, inside = classes.clone(), classes.clone()
    outside[..., 32:], inside[..., :32] = 0, 0
    value, other, changed = (
        make(model, color_map=painted(target), region=region)(images) for target in (classes, outside, inside)
    )
    assert torch.equal(value, other) and not torch.equal(value, changed)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"nothing says what shall be where. Connect color_map, mask or target"),
        ({"class_name": "hair"}, r"class_name is 'hair', and there is no mask"),
        ({"mask": torch.ones(1, 8, 8)}, r"no class ''"),
        ({"mask": torch.ones(1, 8, 8), "class_name": "7"}, r"no class '7'"),
        ({"mask": torch.ones(1, 8, 8), "class_name": "hair", "unlabelled": "sky"}, r"no class 'sky'"),
        ({"mask": torch.zeros(1, 8, 8), "class_name": "hair"}, r"no pixel of target 1 of 1 has a class.*Paint a mask"),
        (
            {"mask": torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), "class_name": "hair"},
            r"no pixel of target 2 of 2 has a class",
        ),
        (
            {"mask": torch.ones(1, 8, 8), "class_name": "hair", "region": torch.zeros(1, 8, 8)},
            r"the region leaves out all that has a class",
        ),
    ],
)
def test_inputs_that_say_nothing_are_refused(inputs, message):
    with pytest.raises(ValueError, match=f"Segmentation Loss: .*{message}"):
        make(load(FACE)[0], **inputs)


# -- the loader --------------------------------------------------------------------------------------------------------


def test_the_loader_offers_what_lies_in_the_folder(tmp_path, monkeypatch):
    assert LoadSegmentationModel.INPUT_TYPES()["required"]["name"][0] == [VOC, FACE]
    register(tmp_path, monkeypatch)
    (entry,) = LoadSegmentationModel.INPUT_TYPES()["required"]["name"][0]
    assert entry == "models/segmentation is empty"
    with pytest.raises(FileNotFoundError, match=r"lraspp_mobilenet_v3_large-d234d4ea\.pth") as error:
        load(entry)
    assert str(tmp_path) in str(error.value)


def test_labels_come_with_the_colours_of_their_data_set():
    _, labels = load(FACE)
    assert labels == "background=#000000\nskin=#f0be96\nhair=#784628\neyes=#ffffff"
    model, labels = load(VOC)
    assert labels.startswith("__background__=#000000\naeroplane=#800000\nbicycle=#008000\nbird=#808000\nboat=#000080")
    assert "person=#c08080" in labels and labels.endswith("tvmonitor=#004080")
    classes = random_classes(1, 8, 8, classes=21)
    found = classes_of(model, color_map=painted(classes, model.network.palette), colors=labels)
    assert torch.equal(found, classes)  # the labels output is what the colors input takes


def test_cityscapes_folders_bring_their_colours(tmp_path, monkeypatch):
    cities = list(nodes.segmentation.CITYSCAPES)
    segformer(id2label=dict(enumerate(cities))).save_pretrained(tmp_path / "cities")
    register(tmp_path, monkeypatch)
    assert "sky=#4682b4" in load("cities/")[1]


def test_other_class_counts_and_half_precision_files_load(tmp_path, monkeypatch):
    weights = {
        name: weight.half() if weight.is_floating_point() else weight for name, weight in lraspp(3).state_dict().items()
    }
    save_file(weights, tmp_path / "mine.safetensors")
    register(tmp_path, monkeypatch)
    model, labels = load("mine.safetensors", "lraspp_mobilenet_v3_large")
    assert labels == "0\n1\n2" and next(model.network.parameters()).dtype == torch.float32
    assert classes_of(model, mask=torch.ones(1, 8, 8), class_name="2").unique() == 2
    with pytest.raises(ValueError, match=r"'mine\.safetensors' does not say which architecture"):
        load("mine.safetensors")
    with pytest.raises(
        ValueError, match=r"does not fit the architecture fcn_resnet50: it has no classifier\.4\.weight"
    ):
        load("mine.safetensors", "fcn_resnet50")
    del weights["backbone.0.0.weight"]
    save_file(weights, tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"does not fit the architecture lraspp.*Missing key.*backbone\.0\.0\.weight"):
        load("mine.safetensors", "lraspp_mobilenet_v3_large")


def test_the_auxiliary_head_of_published_weights_is_left_out(tmp_path, monkeypatch):
    published = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    torch.save(published.state_dict(), tmp_path / "deeplabv3_mobilenet_v3_large-fc3c493d.pth")
    register(tmp_path, monkeypatch)
    model, _ = load("deeplabv3_mobilenet_v3_large-fc3c493d.pth")
    assert model.network.network.aux_classifier is None and len(model.network.labels) == 21


def test_loading_leaves_the_random_numbers_of_the_workflow_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    load(FACE)
    load(VOC)
    assert torch.equal(torch.rand(2), expected)


def test_networks_of_one_size_and_bgr_see_what_their_own_processor_makes(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = transformers.MobileViTConfig(
        image_size=64,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        aspp_out_channels=16,
        num_labels=3,
    )
    theirs = transformers.MobileViTForSemanticSegmentation(config).eval()
    processor = transformers.MobileViTImageProcessor(
        size={"height": 64, "width": 64}, do_resize=False, do_center_crop=False
    )
    theirs.save_pretrained(tmp_path / "mobilevit")
    processor.save_pretrained(tmp_path / "mobilevit")
    register(tmp_path, monkeypatch)
    network = load("mobilevit/")[0].network
    assert network.input_size(100, 300) == (64, 64)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = theirs(**processor(picture, return_tensors="pt")).logits
    logits = network(torch.from_numpy(picture).movedim(-1, 0)[None] / 255)
    expected = F.interpolate(expected, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_without_preprocessor_config_takes_the_defaults_and_says_so(tmp_path, monkeypatch, caplog):
    segformer().save_pretrained(tmp_path / "bare")
    register(tmp_path, monkeypatch)
    model, _ = load("bare/")
    assert "has no preprocessor_config.json" in caplog.text and "(512, 512)" in caplog.text
    assert model.network.size == (512, 512)


def test_an_old_bin_loads_and_one_that_holds_code_does_not(tmp_path, monkeypatch):
    network = segformer()
    network.config.save_pretrained(tmp_path / "old")
    torch.save(network.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    register(tmp_path, monkeypatch)
    loaded = load("old/")[0].network.network
    assert torch.equal(loaded.decode_head.classifier.weight, network.decode_head.classifier.weight)
    torch.save({"weight": Code(tmp_path / "ran")}, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is broken or holds more than weights"):
        load("old/")
    (tmp_path / "lraspp_mobilenet_v3_large.pth").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"Load Segmentation Model: .*lraspp_mobilenet_v3_large\.pth"):
        load("lraspp_mobilenet_v3_large.pth")
    assert not (tmp_path / "ran").exists()


class Code:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_folders_that_hold_no_whole_network_are_refused(tmp_path, monkeypatch):
    register(tmp_path, monkeypatch)
    segformer().segformer.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=r"backbone lacks weights that SegformerForSemanticSegmentation needs"):
        load("backbone/")
    transformers.BertConfig().save_pretrained(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "text" / "model.safetensors")
    with pytest.raises(ValueError, match=r"AutoModelForSemanticSegmentation can't load .*text"):
        load("text/")
    segformer().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty.pytorch_model\.bin"):
        load("empty/")
    segformer(palette=["#000000"]).save_pretrained(tmp_path / "palette")
    with pytest.raises(ValueError, match=r"palette in .*config\.json must list a '#rrggbb' for each of the 4"):
        load("palette/")


def test_a_missing_package_costs_this_node_alone(monkeypatch):
    for package, name in (("torchvision", VOC), ("transformers", FACE)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                ImportError, match=rf"Load Segmentation Model needs .* {package}.* pip install .*{package}"
            ):
                load(name)


def test_the_nodes_import_no_library_of_networks():
    code = (
        "import sys; sys.path.insert(0, 'demo'); from bootstrap import import_host, import_pack\n"
        "import_host(cpu=True)\n"
        "import comfy.model_management, comfy.samplers, comfy.sample, comfy.sd\n"
        "for name in ('torchvision', 'timm', 'transformers'):\n"
        "    for module in [m for m in sys.modules if m.split('.')[0] == name]: sys.modules[module] = None\n"
        "    sys.modules[name] = None\n"
        "import_pack()\n"
        "from sphereguide.nodes import classifier, segmentation\n"
        "for node, _ in (*classifier.NODES.values(), *segmentation.NODES.values()): node.INPUT_TYPES()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
