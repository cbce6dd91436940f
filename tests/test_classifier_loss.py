"""Classifiers: the loss against the libraries' own, the noise-aware form in a real run, and the loader's real files."""

from __future__ import annotations

import json
import re
import sys

import comfy.samplers
import folder_paths
import gaussian_mixture
import pytest
import timm
import tiny_models
import torch
import torch.nn.functional as F
import torchvision
import transformers
from safetensors.torch import save_file
from sphereguide.losses.base import Step
from sphereguide.losses.classifier import Classification
from sphereguide.models.classifier import NoisyLatentClassifier
from sphereguide.models.decoder import Decoder
from sphereguide.nodes.classifier import ClassifierLoss, LoadImageClassifier
from sphereguide.samplers.autograd import differentiable
from sphereguide.samplers.dsg import Guidance, guided
from sphereguide.samplers.trace import GuidanceTrace

VIT, TIMM, NOISY, FILE = "vit/", "timm/", "noisy/", "mobilenet_v3_small-mine.pth"
LABELS = ["cat, house cat", "crane", "dog", "Crane"]
NOISY_CONFIG = {"in_channels": 4, "labels": ["day", "night", "dusk"], "width": 8, "channel_mult": [1, 2], "blocks": 1}
CLASSES = {VIT: "dog", TIMM: "teapot", FILE: "2", NOISY: "night"}


def vit(**changes):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.2,
        "id2label": dict(enumerate(LABELS)),
        **changes,
    }
    return transformers.ViTForImageClassification(transformers.ViTConfig(**settings))


def save_timm(folder, **config):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3, img_size=32)
    pretrained_cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "input_size": [3, 32, 32]}
    settings = {
        "architecture": "test_vit",
        "num_classes": 3,
        "label_names": ["kettle", "teapot", "cup"],
        "model_args": {"img_size": 32},
        "pretrained_cfg": pretrained_cfg,
        **config,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network.eval()


def save_noisy(folder, **config):
    torch.manual_seed(0)
    network = NoisyLatentClassifier(**NOISY_CONFIG)
    folder.mkdir()
    settings = {"architecture": "NoisyLatentClassifier", "noise_aware": True, **NOISY_CONFIG, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network.eval()


def mobilenet(classes):
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(weights=None, num_classes=classes)
    # Random weights let the signal die away, and all images get the same logits, unless the norms come from data.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.rand(4, 3, 224, 224))
    return network.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models/classifiers with one of each kind."""
    folder = tmp_path_factory.mktemp("classifiers")
    vit().save_pretrained(folder / VIT)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / VIT)
    save_timm(folder / TIMM)
    save_noisy(folder / NOISY)
    torch.save(mobilenet(5).state_dict(), folder / FILE)
    return folder


@pytest.fixture(autouse=True)
def registered(models, monkeypatch):
    register(models, monkeypatch)


def register(folder, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_folder_paths", {"classifiers": [str(folder)]}.__getitem__)


def load(name, architecture=""):
    with torch.inference_mode():
        return LoadImageClassifier().load(name, architecture)


def make(model, class_name):
    with torch.inference_mode():
        return ClassifierLoss().make(model, class_name)[0]


def evaluated(loss, images, step=None):
    """The loss and its gradient, as a sampler takes them."""
    with differentiable(loss) as recording, recording():
        images = images.clone().requires_grad_()
        value = loss(images, step)
        return value.detach(), torch.autograd.grad(value.sum(), images)[0]


def pictures(*size, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed))


def normalised(images, mean, std):
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_negative_log_probability():
    images = pictures(2, 3, 32, 32)
    with torch.no_grad():
        logits = vit().eval()(pixel_values=normalised(images, [0.5] * 3, [0.5] * 3)).logits
    expected = [-logits[i].softmax(0)[2].log() for i in range(2)]
    torch.testing.assert_close(make(load(VIT)[0], "Dog")(images), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_timm_folders_are_normalised_by_their_own_numbers(tmp_path):
    network = save_timm(tmp_path / "same")
    images = pictures(2, 3, 32, 32)
    with torch.no_grad():
        logits = network(normalised(images, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    expected = F.cross_entropy(logits, torch.tensor([1, 1]), reduction="none")
    torch.testing.assert_close(make(load(TIMM)[0], "teapot")(images), expected, rtol=1e-5, atol=1e-6)


def test_torchvision_files_are_normalised_as_torchvision_says():
    images = pictures(2, 3, 224, 224)
    with torch.no_grad():
        logits = mobilenet(5)(normalised(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = F.cross_entropy(logits, torch.tensor([2, 2]), reduction="none")
    assert (logits[0] - logits[1]).abs().max() > 0.01
    torch.testing.assert_close(make(load(FILE)[0], "2")(images), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLASSES)
def test_a_sample_decides_its_own_loss_and_gradient(name):
    loss = make(load(name)[0], CLASSES[name])
    samples = pictures(3, 4, 6, 8) if name == NOISY else pictures(3, 3, 48, 40)
    timesteps = torch.tensor([900, 500, 3])
    value, gradient = evaluated(loss, samples, Step(timestep=timesteps))
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    for i in range(3):
        alone = evaluated(loss, samples[i : i + 1], Step(timestep=timesteps[i : i + 1]))
        torch.testing.assert_close(value[i : i + 1], alone[0], rtol=1e-4, atol=1e-6)
        largest = float(alone[1].abs().max())
        torch.testing.assert_close(gradient[i : i + 1], alone[1], rtol=1e-3, atol=1e-3 * largest)
    assert value.unique().numel() == 3


@pytest.mark.parametrize("name", [VIT, TIMM, FILE])
def test_the_gradient_leads_to_the_class(name):
    loss = make(load(name)[0], CLASSES[name])
    images = pictures(1, 3, 40, 64)
    value, gradient = evaluated(loss, images)
    assert loss(images - 0.01 * gradient / gradient.square().mean().sqrt()) < value


def test_gradients_reach_the_latent_through_crop_and_vae():
    loss = make(load(VIT)[0], "dog")
    with torch.inference_mode():
        decode = Decoder(tiny_models.TinyVAE())
    with differentiable(loss, decode.module) as recording, recording(lenient=True):
        latent = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(decode(latent)).sum(), latent)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [VIT, NOISY])
def test_half_precision_samples_are_judged_in_float32(dtype, name):
    loss = make(load(name)[0], CLASSES[name])
    samples = (pictures(2, 4, 6, 8) if name == NOISY else pictures(2, 3, 40, 24)).to(dtype)
    step = Step(timestep=torch.tensor([500, 20]))
    value, gradient = evaluated(loss, samples, step)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, loss(samples.float(), step))
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_the_network_sees_the_middle_of_the_image_undistorted():
    network = load(VIT)[0].network
    wide = pictures(1, 3, 32, 80)
    torch.testing.assert_close(network(wide), network(wide[..., 24:56]))
    _, gradient = evaluated(make(load(VIT)[0], "dog"), wide)
    assert gradient[..., 24:56].abs().sum() > 0
    assert gradient[..., :24].abs().sum() == 0 == gradient[..., 56:].abs().sum()


def test_a_class_of_several_at_once_has_a_probability_of_its_own(tmp_path, monkeypatch):
    network = vit(problem_type="multi_label_classification")
    network.save_pretrained(tmp_path / "tags")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tags")
    register(tmp_path, monkeypatch)
    images = pictures(1, 3, 32, 32)
    with torch.no_grad():
        logits = network.eval()(pixel_values=normalised(images, [0.5] * 3, [0.5] * 3)).logits
    expected = -logits[:, 2].sigmoid().log()
    torch.testing.assert_close(make(load("tags/")[0], "dog")(images), expected, rtol=1e-5, atol=1e-6)


def test_the_network_is_the_one_under_model_management():
    for name, class_name in CLASSES.items():
        model, _ = load(name)
        loss = make(model, class_name)
        assert loss.patchers == (model.patcher,)
        assert loss.network is model.patcher.model and not loss.network.training
        assert not any(parameter.requires_grad for parameter in loss.parameters())


# -- noise-aware -------------------------------------------------------------------------------------------------------


def test_a_noise_aware_classifier_is_asked_about_noisy_latents_of_any_size():
    model, labels = load(NOISY)
    assert labels == "day\nnight\ndusk"
    loss = make(model, "night")
    assert loss.space == "noisy" and make(load(VIT)[0], "dog").space == "image"
    for size in ((2, 2), (7, 5), (16, 24)):
        x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
        value, gradient = evaluated(loss, x, Step(timestep=torch.tensor([999, 0])))
        logits = model.network(x, torch.tensor([999, 0]))
        torch.testing.assert_close(value, -logits.softmax(1)[:, 1].log())
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_a_noise_aware_classifier_tells_timesteps_apart():
    loss = make(load(NOISY)[0], "night")
    x = pictures(1, 4, 8, 8).expand(3, -1, -1, -1)
    value = loss(x, Step(timestep=torch.tensor([10, 400, 401])))
    assert value.unique().numel() == 3
    torch.testing.assert_close(loss(x, Step(timestep=torch.tensor([10])))[2], value[0])


def test_a_noise_aware_classifier_refuses_what_it_can_not_judge():
    loss = make(load(NOISY)[0], "night")
    with pytest.raises(ValueError, match="must be told the timestep"):
        loss(pictures(1, 4, 8, 8))
    for shape in ((1, 16, 8, 8), (1, 4, 1, 8, 8)):
        with pytest.raises(ValueError, match=rf"latents of 4 channels.*{re.escape(str(list(shape[1:])))}"):
            loss(torch.rand(shape), Step(timestep=torch.tensor([5])))


def test_a_sampler_guided_by_it_tells_it_what_its_own_network_sees():
    patcher = gaussian_mixture.patcher()
    model, _ = load(NOISY)
    loss = make(model, "night")
    seen = []
    hook = model.network.register_forward_pre_hook(lambda _, inputs: seen.append([t.detach() for t in inputs]))
    sampling = patcher.model.model_sampling
    with torch.inference_mode():
        sampler = guided(
            comfy.samplers.ksampler("euler_ancestral"), Guidance(loss, guidance_rate=0.5), trace := GuidanceTrace()
        )
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds([[torch.zeros(1, 1, 1), {}]], [[torch.zeros(1, 1, 1), {}]])
        guider.set_cfg(1.0)
        sigmas = comfy.samplers.calculate_sigmas(sampling, "karras", 4)
        noise = torch.randn(2, *gaussian_mixture.SHAPE, generator=torch.manual_seed(4))
        latent = torch.zeros_like(noise)
        result = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=4)
    hook.remove()
    assert result.isfinite().all() and len(trace.steps) >= 3
    assert len(seen) >= 3
    for (x, timestep), sigma in zip(seen, sigmas, strict=False):
        assert torch.equal(timestep, sampling.timestep(sigma.expand(2)))
        assert x.shape == noise.shape
    torch.testing.assert_close(seen[0][0], noise * sigmas[0] / (1 + sigmas[0] ** 2) ** 0.5, rtol=0.01, atol=0.01)


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "index"), [("DOG ", 2), ("house_cat", 0), ("Cat", 0), ("cat, house cat", 0), ("3", 3), ("0", 0)]
)
def test_a_class_is_a_label_a_part_of_one_or_a_number(name, index):
    assert make(load(VIT)[0], name).index == index


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crane", r"1 \(crane\) and 3 \(Crane\) are all classes named 'crane'\. Give the number"),
        ("hose cat", r"no class 'hose cat'\. Did you mean house cat"),
        ("4", r"no class '4'"),
        ("-1", r"no class '-1'"),
        ("", r"no class ''\. Its classes: cat, house cat, crane, dog, Crane"),
    ],
)
def test_a_class_that_is_not_there_is_answered_with_those_that_are(name, message):
    with pytest.raises(ValueError, match=f"Classifier Loss: .*{message}"):
        make(load(VIT)[0], name)


# -- the loader --------------------------------------------------------------------------------------------------------


def test_the_loader_offers_what_lies_in_the_folder(tmp_path, monkeypatch):
    assert LoadImageClassifier.INPUT_TYPES()["required"]["name"][0] == sorted([FILE, NOISY, TIMM, VIT])
    register(tmp_path, monkeypatch)
    (entry,) = LoadImageClassifier.INPUT_TYPES()["required"]["name"][0]
    assert entry == "models/classifiers is empty"
    with pytest.raises(FileNotFoundError, match=r"resnet50-11ad3fa6\.pth") as error:
        load(entry)
    assert str(tmp_path) in str(error.value)


def test_labels_come_from_where_each_library_keeps_them(tmp_path, monkeypatch):
    assert load(VIT)[1] == "\n".join(LABELS)
    assert load(TIMM)[1] == "kettle\nteapot\ncup"
    assert load(FILE)[1] == "0\n1\n2\n3\n4"
    save_file(mobilenet(1000).state_dict(), tmp_path / "mobilenet_v3_small-047dcff4.safetensors")
    register(tmp_path, monkeypatch)
    model, labels = load("mobilenet_v3_small-047dcff4.safetensors")
    assert labels.startswith("tench\ngoldfish\n") and labels.count("\n") == 999
    assert make(model, "golden retriever").index == 207
    with pytest.raises(ValueError, match=r"264 \(Cardigan\) and 474 \(cardigan\)"):
        make(model, "cardigan")


@pytest.mark.slow
def test_googlenet_normalises_as_it_was_trained(tmp_path, monkeypatch):
    """As `torchvision.models.googlenet(weights=…)` sets it up: what comes in is not its own normalisation."""
    network = torchvision.models.googlenet(num_classes=3, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "googlenet-mine.pth")
    register(tmp_path, monkeypatch)
    assert load("googlenet-mine.pth")[0].network.network.transform_input is True


@pytest.mark.slow
def test_files_of_densenet_have_its_older_names(tmp_path, monkeypatch):
    network = torchvision.models.densenet121(num_classes=3)
    older = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value
        for name, value in network.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in older
    torch.save(older, tmp_path / "densenet121-mine.pth")
    register(tmp_path, monkeypatch)
    loaded = load("densenet121-mine.pth")[0].network.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "head"),
    [("resnet18", "fc"), ("shufflenet_v2_x0_5", "fc"), ("squeezenet1_1", "classifier.1"), ("regnet_y_400mf", "fc")],
)
def test_the_number_of_classes_is_read_from_the_weights(architecture, head, tmp_path, monkeypatch):
    network = torchvision.models.get_model(architecture, weights=None, num_classes=6)
    assert f"{head}.weight" in network.state_dict()
    save_file(network.state_dict(), tmp_path / f"{architecture}.safetensors")
    register(tmp_path, monkeypatch)
    assert len(load(f"{architecture}.safetensors")[0].network.labels) == 6


def test_files_that_do_not_fit_say_so(tmp_path, monkeypatch):
    save_file(mobilenet(3).state_dict(), tmp_path / "mine.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "resnet18.safetensors")
    register(tmp_path, monkeypatch)
    assert load("mine.safetensors", " MobileNet_v3_small")[1] == "0\n1\n2"
    with pytest.raises(ValueError, match=r"'mine\.safetensors' does not say which architecture"):
        load("mine.safetensors")
    with pytest.raises(ValueError, match=r"torchvision has no classifier named 'lenet'.*resnet18"):
        load("mine.safetensors", "lenet")
    with pytest.raises(ValueError, match=r"does not fit the architecture mobilenet_v3_large"):
        load("mine.safetensors", "mobilenet_v3_large")
    with pytest.raises(ValueError, match=r"does not fit the architecture resnet18: it has no classifying head"):
        load("resnet18.safetensors")


def test_folders_that_hold_no_classifier_say_so(tmp_path, monkeypatch):
    register(tmp_path, monkeypatch)
    vit().vit.save_pretrained(tmp_path / "backbone")
    save_timm(tmp_path / "unknown", architecture="hf-hub:someone/something")
    save_timm(tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    save_timm(tmp_path / "other", num_classes=4)
    vit(id2label={0: "thing"}).save_pretrained(tmp_path / "one")
    save_noisy(tmp_path / "other noisy", architecture="EncoderUNetModel")
    save_noisy(tmp_path / "odd noisy", depth=3)
    save_noisy(tmp_path / "negative noisy", in_channels=-1)
    save_noisy(tmp_path / "wide noisy", width=16)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, message in {
        "backbone/": r"backbone lacks weights that ViTForImageClassification needs",
        "unknown/": r"timm .* knows no architecture 'hf-hub:someone/something'",
        "weightless/": r"no model\.safetensors beside it",
        "other/": r"does not fit the architecture test_vit.*head\.weight",
        "one/": r"one tells no classes apart, it has 1\. Load a network of two classes or more",
        "other noisy/": r"'EncoderUNetModel'\. The only one that is known is NoisyLatentClassifier",
        "odd noisy/": r"the settings in .*config\.json make no classifier.*depth",
        "negative noisy/": r"the settings in .*config\.json make no classifier.*negative dimension",
        "wide noisy/": r"does not fit the architecture NoisyLatentClassifier",
        "broken/": r"config\.json can't be read",
    }.items():
        with pytest.raises(ValueError, match=f"Load Image Classifier: .*{message}"):
            load(name)


def test_loading_leaves_the_random_numbers_of_the_workflow_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    for name in CLASSES:
        load(name)
    assert torch.equal(torch.rand(2), expected)


def test_a_missing_package_costs_its_own_kind_alone(monkeypatch):
    for package, name in (("torchvision", FILE), ("timm", TIMM), ("transformers", VIT)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                ImportError, match=rf"Load Image Classifier needs .* {package}.* pip install .*{package}"
            ):
                load(name)
            load(NOISY)


def test_the_loss_needs_no_host():
    class Network(torch.nn.Module):
        noise_aware = multi_label = False

        def forward(self, images):
            return images.mean((2, 3))

    images = pictures(2, 3, 5, 5)
    expected = F.cross_entropy(images.mean((2, 3)), torch.tensor([1, 1]), reduction="none")
    torch.testing.assert_close(Classification(Network(), 1)(images), expected)
