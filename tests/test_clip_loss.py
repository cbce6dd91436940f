"""CLIP losses against direct computation, and open_clip's loader with small models of its real classes."""

from __future__ import annotations

import json
import logging
import math
import socket
import sys
import zipfile
from pathlib import Path

import comfy.model_patcher
import folder_paths
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from sphereguide.losses.base import Step
from sphereguide.losses.clip import CLIPImage, CLIPText, Cutouts, cosine, spherical
from sphereguide.models import clip_model
from sphereguide.models.decoder import Decoder
from sphereguide.models.network import managed
from sphereguide.nodes.clip import CLIPImageLoss, CLIPTextLoss, LoadOpenCLIP, weighted_texts
from sphereguide.samplers.autograd import differentiable

open_clip = pytest.importorskip("open_clip")

MEAN, STD = [0.3, 0.5, 0.6], [0.2, 0.25, 0.3]
MODEL_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
TEXT, IMAGE, LOADER = "CLIP Text Loss", "CLIP Image Loss", "Load open_clip Model"
VIEWS = {"distance": "spherical", "cutouts": 0, "min_size": 0.5, "max_size": 1.0, "augment": True}


def network(seed=0, **changes):
    """A model of open_clip's plain class, as its training saves them."""
    torch.manual_seed(seed)
    return open_clip.CLIP(**{**MODEL_CFG, **changes}).eval()


@pytest.fixture(scope="module")
def weights():
    return {name: tensor.contiguous() for name, tensor in network().state_dict().items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"asks the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def models(monkeypatch, tmp_path):
    """An empty models/open_clip and an empty Hugging Face cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr("sphereguide.models.network.OWN", tmp_path)
    registry = folder_paths.folder_names_and_paths
    registry = getattr(registry, "contents", registry)  # PyPI's host keeps its own class around the dict
    monkeypatch.setitem(registry, "open_clip", None)
    del registry["open_clip"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "models" / "open_clip"
    folder.mkdir(parents=True)
    return folder


def save(folder, weights, model_cfg=MODEL_CFG, name="open_clip_model.safetensors"):
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, folder / name)


def load(entry, dtype="fp32"):
    with torch.inference_mode():
        return LoadOpenCLIP().load(entry, dtype)[0]


@pytest.fixture
def clip(models, weights):
    save(models / "tiny", weights)
    return load("tiny/")


@pytest.fixture
def pretrained(monkeypatch, models):
    """`Tiny-32:toy`, one more of open_clip's pretrained models. Counts what is downloaded."""
    path = models.parent / "Tiny-32.json"
    path.write_text(json.dumps(MODEL_CFG))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS, path])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.factory._rescan_model_configs()
    cfg = {"hf_hub": "somebody/tiny_clip_32.toy/", "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    table = {**clip_model._pretrained(), "Tiny-32:toy": cfg}
    monkeypatch.setattr(clip_model, "_pretrained", lambda: table)
    downloads = []
    monkeypatch.setattr(open_clip, "download_pretrained", downloads.append)
    return downloads


def cached(models, weights, repository="somebody/tiny_clip_32.toy", name="open_clip_model.safetensors"):
    """A repository in the Hugging Face cache, laid out as huggingface_hub does."""
    folder = models.parents[1] / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    if weights is not None:
        save_file(weights, snapshot / name)
    return snapshot


def text_loss(clip, text="a red car", negative_text="", negative_weight=0.5, **views):
    with torch.inference_mode():
        return CLIPTextLoss().make(clip, text, negative_text, negative_weight, **{**VIEWS, **views})[0]


def image_loss(clip, image, references="average", **views):
    with torch.inference_mode():
        return CLIPImageLoss().make(clip, image, references, **{**VIEWS, **views})[0]


def gradient(loss, images, step=None):
    """Loss and its gradient, as a sampler takes them: the loss was made in inference mode."""
    assert next(loss.tower.parameters()).is_inference()  # the trap is set
    with differentiable(loss) as recording, recording():
        variable = images.detach().clone().requires_grad_()
        value = loss(variable, step)
        return value.detach(), torch.autograd.grad(value.sum(), variable)[0]


def pictures(batch=2, height=32, width=32, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def theirs(weights, images=None, texts=None):
    """Embeddings by open_clip's own class and tokenizer; images at the size of the network."""
    model = open_clip.CLIP(**MODEL_CFG).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        if texts is not None:
            return model.encode_text(open_clip.tokenize(texts), normalize=True)
        mean, std = torch.tensor(MEAN).reshape(3, 1, 1), torch.tensor(STD).reshape(3, 1, 1)
        return model.encode_image((images - mean) / std, normalize=True)


# -- loader ------------------------------------------------------------------------------------------------------------


def test_a_local_folder_gives_open_clips_embeddings(clip, weights):
    images, texts = pictures(), ["a red car", "An old man, smiling!"]
    with torch.inference_mode():
        torch.testing.assert_close(clip.embed_images(images), theirs(weights, images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(clip.embed_texts(texts), theirs(weights, texts=texts), rtol=1e-4, atol=1e-5)
    tower = clip.tower
    assert (tower.image_size, tower.mean, tower.std) == ((32, 32), tuple(MEAN), tuple(STD))
    assert clip.image.model is tower and not any(parameter.requires_grad for parameter in tower.parameters())
    assert not tower.training


class Outside(torch.nn.Module):
    """As networks of other packages are: parameters beside children, and layers that are not the host's."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.zeros(4))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))


def test_a_network_of_another_package_is_loaded_and_unloaded_as_a_whole():
    """With little memory a host loads its own layers in parts, and would leave these on two devices."""
    elsewhere = torch.device("meta")  # a second device, as far as places go
    with torch.inference_mode():
        patcher = managed(Outside())
    patcher.load_device = elsewhere

    def places():
        return {parameter.device.type for parameter in patcher.model.parameters()}

    if hasattr(comfy.model_patcher.ModelPatcher, "partially_load"):
        patcher.partially_load(elsewhere, extra_memory=1)
        assert places() == {"meta"}
        patcher.partially_load(elsewhere, extra_memory=-1)
        assert patcher.partially_unload(torch.device("cpu"), 1) == 0
    else:
        patcher.patch_model_lowvram(elsewhere, lowvram_model_memory=1)
    assert places() == {"meta"}


def test_the_image_tower_is_managed_without_the_text_tower(clip):
    assert not any("text" in name or "token" in name for name, _ in clip.tower.named_parameters())
    assert clip.image.model_size() < clip.text.model_size()


@pytest.mark.parametrize(
    "place",
    [
        "Tiny-32-toy.safetensors",
        "tiny_32-toy-46683a32.safetensors",  # as open_clip's releases were called
        "Tiny-32-toy/open_clip_model.safetensors",
        "tiny_clip_32.toy/open_clip_model.safetensors",  # as the repository is called
        "sub/tiny-32_toy.safetensors",
    ],
)
def test_a_pretrained_model_is_found_under_models(models, pretrained, weights, place):
    (models / place).parent.mkdir(exist_ok=True)
    save_file(weights, models / place)
    assert "Tiny-32:toy" in clip_model.entries() and place not in clip_model.entries()
    clip = load("Tiny-32:toy")
    assert (clip.tower.mean, clip.tower.interpolation) == (tuple(MEAN), "bilinear")
    images = pictures()
    with torch.inference_mode():
        torch.testing.assert_close(clip.embed_images(images), theirs(weights, images), rtol=1e-4, atol=1e-5)
    assert not pretrained


def test_a_repositorys_folder_serves_its_pretrained_model(models, pretrained, weights):
    save(models / "tiny_clip_32.toy", weights)
    assert {"tiny_clip_32.toy/", "Tiny-32:toy"} <= set(clip_model.entries())
    assert load("Tiny-32:toy").tower.interpolation == "bicubic"  # that of the folder's configuration


def test_a_pretrained_model_is_found_in_the_hugging_face_cache(models, pretrained, weights):
    assert "Tiny-32:toy (download)" in clip_model.entries()
    cached(models, weights)
    assert "Tiny-32:toy" in clip_model.entries() and "Tiny-32:toy (download)" not in clip_model.entries()
    assert load("Tiny-32:toy").tower.mean == tuple(MEAN)
    assert load("Tiny-32:toy (download)").tower.mean == tuple(MEAN)  # from a workflow made before the download
    assert not pretrained


def test_nothing_is_downloaded_unless_the_entry_says_so(models, pretrained, weights, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Pick 'Tiny-32:toy \(download\)', or put .*somebody/tiny_clip_32.toy"):
        load("Tiny-32:toy")
    assert not pretrained
    file = tmp_path / "downloaded.safetensors"
    save_file(weights, file)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: pretrained.append(cfg) or str(file))
    load("Tiny-32:toy (download)")
    assert [cfg["hf_hub"] for cfg in pretrained] == ["somebody/tiny_clip_32.toy/"]


def test_a_failed_download_says_where_to_get_the_file(models, pretrained, monkeypatch):
    def fail(cfg):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    advice = r"Put the files of https://huggingface.co/somebody/tiny_clip_32.toy into .*Tiny-32-toy instead.*no route"
    with pytest.raises(FileNotFoundError, match=advice):
        load("Tiny-32:toy (download)")


def test_the_weights_decide_between_gelu_and_quick_gelu(models, pretrained, weights):
    clip_model._pretrained()["Tiny-32:toy"]["quick_gelu"] = True
    save_file(weights, models / "Tiny-32-toy.safetensors")
    model = network(quick_gelu=True)
    model.load_state_dict(weights)
    images, clip = pictures(), load("Tiny-32:toy")
    with torch.inference_mode():
        expected = model.encode_image(clip.tower.prepare(images), normalize=True)
        torch.testing.assert_close(clip.embed_images(images), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, theirs(weights, images), atol=1e-3)


def test_every_pretrained_model_of_open_clip_is_listed_without_importing_it(models, monkeypatch):
    expected = {f"{model}:{tag} (download)" for model, tag in open_clip.list_pretrained()}
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    clip_model._pretrained.cache_clear()
    assert set(clip_model.entries()) == expected and len(expected) > 100
    assert "open_clip" not in sys.modules


def test_without_open_clip_folders_are_listed_and_running_names_the_command(models, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr(clip_model, "_pretrained", clip_model._pretrained.__wrapped__)
    assert clip_model.entries() == [clip_model.NOTHING]
    save(models / "tiny", weights)
    assert clip_model.entries() == ["tiny/"]
    with pytest.raises(ImportError, match="pip install open-clip-torch"):
        load("tiny/")


def test_an_open_clip_that_is_broken_takes_no_node_with_it_and_says_so(models, weights, monkeypatch, tmp_path, caplog):
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").touch()
    (tmp_path / "open_clip" / "pretrained.py").write_text("import a_package_that_is_gone")
    monkeypatch.delitem(sys.modules, "open_clip")
    monkeypatch.delitem(sys.modules, "_sphereguide_open_clip.pretrained", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(clip_model, "_pretrained", clip_model._pretrained.__wrapped__)
    save(models / "tiny", weights)
    with caplog.at_level(logging.WARNING, "sphereguide"):
        assert clip_model.entries() == ["tiny/"]
    assert "Load open_clip Model: open_clip can't list its pretrained models (ModuleNotFoundError: " in caplog.text


def test_an_empty_folder_says_what_to_put_there(models):
    with pytest.raises(FileNotFoundError, match=r"no model in .*open_clip\. .*huggingface.co"):
        load(clip_model.NOTHING)


def test_a_workflows_entry_need_not_be_in_the_list():
    assert LoadOpenCLIP.VALIDATE_INPUTS(model="Tiny-32:toy (download)") is True


def test_weights_without_a_configuration_are_refused_with_a_way_out(models, weights):
    save_file(weights, models / "mine.safetensors")
    assert "mine.safetensors" in clip_model.entries()
    with pytest.raises(ValueError, match=r"which architecture .*'mine.safetensors'.*list_pretrained.*config.json"):
        load("mine.safetensors")


def test_a_configuration_may_leave_the_preprocessing_open(models, weights):
    save(models / "tiny", weights)
    (models / "tiny" / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CFG, "preprocess_cfg": None}))
    assert load("tiny/").tower.mean == open_clip.OPENAI_DATASET_MEAN


def test_missing_parts_of_a_folder_are_named(models, weights):
    save(models / "tiny", None)
    with pytest.raises(FileNotFoundError, match=r"no weights in .*tiny.*open_clip_model.safetensors"):
        load("tiny/")
    save(models / "other", weights)
    (models / "other" / "open_clip_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no open_clip_config.json in .*other"):
        load("other/")
    with pytest.raises(FileNotFoundError, match=r"'gone/' is not in models/open_clip"):
        load("gone/")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ('{"model_cfg": {"embed_dim": 8, "text_cfg": {}}}', "lacks vision_cfg"),
        ('{"model_cfg": {"embed_dim": 8, "vision_cfg": {"wheels": 4}, "text_cfg": {}}}', "can build.*wheels"),
    ],
)
def test_a_broken_configuration_is_named(models, weights, content, message):
    save(models / "tiny", weights)
    (models / "tiny" / "open_clip_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{LOADER}: .*{message}"):
        load("tiny/")


def test_a_truncated_file_is_named(models, weights):
    save(models / "tiny", weights)
    file = models / "tiny" / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors can't be read, it may be a broken download"):
        load("tiny/")


def test_weights_of_another_architecture_are_named(models):
    other = network(embed_dim=16).state_dict()
    save(models / "tiny", {name: tensor.contiguous() for name, tensor in other.items()})
    with pytest.raises(ValueError, match=r"(?s)not those of the architecture.*size mismatch"):
        load("tiny/")


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_that_runs_code_is_refused(models, tmp_path):
    save(models / "tiny", None)
    torch.save({"state_dict": Payload(tmp_path / "ran")}, models / "tiny" / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than weights"):
        load("tiny/")
    assert not (tmp_path / "ran").exists()


def test_a_training_checkpoint_loads(models, weights):
    save(models / "tiny", None)
    state = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}
    torch.save(state, models / "tiny" / "open_clip_pytorch_model.bin")
    clip, images = load("tiny/"), pictures()
    with torch.inference_mode():
        torch.testing.assert_close(clip.embed_images(images), theirs(weights, images), rtol=1e-4, atol=1e-5)


def test_openais_own_files_are_refused_with_a_place_to_get_others(models):
    save(models / "tiny", None)
    torch.jit.script(torch.nn.Linear(2, 2)).save(models / "tiny" / "ViT-B-32.pt")
    assert zipfile.is_zipfile(models / "tiny" / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"OpenAI's own files.*https://huggingface.co/timm"):
        load("tiny/")


def test_safetensors_come_before_pickles(models, weights):
    save(models / "tiny", weights)
    (models / "tiny" / "open_clip_pytorch_model.bin").write_bytes(b"broken")
    load("tiny/")


def hugging_face_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "car"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


HF_CFG = {**MODEL_CFG, "text_cfg": {**MODEL_CFG["text_cfg"], "hf_tokenizer_name": "somebody/words"}}


def test_a_folders_own_tokenizer_is_used_offline(models, weights, caplog):
    save(models / "tiny", weights, HF_CFG)
    hugging_face_tokenizer(models / "tiny")
    clip = load("tiny/")
    assert clip.text.model.tokenizer(["a red car"])[0, :6].tolist() == [1, 4, 5, 6, 2, 0]
    assert clip.text.model.tokens("a red car") == 5
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "sphereguide"):
        assert clip.embed_texts(["a red car", "a " * 100]).shape == (2, 32)
    assert caplog.text.count("reads 77 tokens") == 1


def test_a_tokenizer_of_the_hugging_face_cache_is_used_offline(models, weights):
    save(models / "tiny", weights, HF_CFG)
    hugging_face_tokenizer(cached(models, None, "somebody/words"))
    assert load("tiny/").text.model.tokens("a car") == 4


def test_a_missing_tokenizer_is_named_with_its_folder_and_source(models, weights):
    save(models / "tiny", weights, HF_CFG)
    with pytest.raises(FileNotFoundError, match=r"huggingface.co/somebody/words\) into .*tiny, or run: +hf download"):
        load("tiny/")
    (models / "tiny" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer in .*tiny can't be read.*huggingface.co/somebody/words"):
        load("tiny/")


def test_a_hugging_face_text_tower_takes_its_configuration_from_the_cache(models, weights):
    text_cfg = {"hf_model_name": "somebody/roberta", "hf_tokenizer_name": "somebody/words", "hf_proj_type": "mlp"}
    model_cfg = {**MODEL_CFG, "text_cfg": {**text_cfg, "context_length": 16}}
    save(models / "tiny", weights, model_cfg)
    hugging_face_tokenizer(models / "tiny")
    with pytest.raises(FileNotFoundError, match=r"needs config.json of the Hugging Face repository somebody/roberta"):
        load("tiny/")
    from transformers import RobertaConfig

    snapshot = cached(models, None, "somebody/roberta")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaConfig(vocab_size=16, **sizes).save_pretrained(snapshot)
    local = {**model_cfg["text_cfg"], "hf_model_name": str(snapshot), "hf_model_pretrained": False}
    model = open_clip.CustomTextCLIP(**{**MODEL_CFG, "text_cfg": local})
    save(models / "tiny", {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, model_cfg)
    with torch.inference_mode():
        assert load("tiny/").embed_texts(["a red car"]).shape == (1, 32)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**config, "_attn_implementation_internal": "some/body"}))
    with pytest.raises(ValueError, match="is not whole: its '_attn_implementation_internal' asks for code"):
        load("tiny/")


def test_a_timm_tower_that_would_be_fetched_is_refused(models, weights):
    save(models / "tiny", weights, {**MODEL_CFG, "vision_cfg": {"timm_model_name": "hf-hub:a/b", "image_size": 32}})
    with pytest.raises(ValueError, match="timm would fetch 'hf-hub:a/b'"):
        load("tiny/")


def test_coca_gives_its_pooled_embedding(models):
    tower = {**MODEL_CFG["vision_cfg"], "output_tokens": True, "attentional_pool": True}
    text = {**MODEL_CFG["text_cfg"], "context_length": 76, "embed_cls": True, "output_tokens": True}
    text["vocab_size"] = 49408
    decoder = {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 64, "vision_cfg": tower, "text_cfg": text, "multimodal_cfg": decoder}
    model = open_clip.CoCa(**cfg).eval()
    save(models / "coca", {k: v.contiguous() for k, v in model.state_dict().items()}, {**cfg, "custom_text": True})
    clip, images = load("coca/"), pictures()
    with torch.inference_mode():
        expected = model.encode_image(clip.tower.prepare(images), normalize=True)
        torch.testing.assert_close(clip.embed_images(images), expected, rtol=1e-4, atol=1e-5)
        expected = model.encode_text(open_clip.tokenize(["a car"], 76), normalize=True)
        torch.testing.assert_close(clip.embed_texts(["a car"]), expected, rtol=1e-4, atol=1e-5)


def test_bf16_is_close_to_fp32_and_has_a_gradient(models, weights, clip):
    half = load("tiny/", "bf16")
    assert {parameter.dtype for parameter in half.tower.parameters()} == {torch.bfloat16}
    assert half.image.model_size() < 0.6 * clip.image.model_size()
    images = pictures(2, 40, 56)
    exact, exact_gradient = gradient(text_loss(clip), images)
    value, g = gradient(text_loss(half), images)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, rtol=0.02, atol=0.02)
    assert torch.cosine_similarity(g.flatten(1), exact_gradient.flatten(1)).min() > 0.95


# -- preparing images --------------------------------------------------------------------------------------------------


def test_images_of_any_size_are_squeezed_with_antialiasing(clip):
    x = torch.arange(128)
    fine = ((x[:, None] + x) % 2).float().expand(1, 3, 128, 128)
    mean, std = torch.tensor(MEAN).reshape(3, 1, 1), torch.tensor(STD).reshape(3, 1, 1)
    seen = clip.tower.prepare(fine[..., :64, :])
    assert seen.shape == (1, 3, 32, 32)
    assert (seen * std + mean - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_may_come_in_any_dtype(clip, dtype):
    images = pictures(2, 48, 40).to(dtype)
    value, g = gradient(text_loss(clip, cutouts=2), images)
    assert value.dtype == torch.float32 and g.dtype == dtype and g.isfinite().all() and g.abs().max() > 0
    expected, _ = gradient(text_loss(clip, cutouts=2), images.float())
    torch.testing.assert_close(value, expected)


def test_each_border_of_a_wide_picture_has_a_gradient(clip):
    _, g = gradient(text_loss(clip), pictures(1, 40, 160))
    for border in (g[..., 0], g[..., -1], g[..., 0, :], g[..., -1, :]):
        assert border.abs().max() > 1e-3 * g.abs().max()


# -- distances ---------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_their_formulas():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(9, 16, generator=generator).double(), dim=-1) for _ in "ab")
    torch.testing.assert_close(spherical(a, b), 2 * ((a - b).norm(dim=-1) / 2).arcsin() ** 2)
    torch.testing.assert_close(spherical(a, b), (a * b).sum(-1).arccos() ** 2 / 2)
    torch.testing.assert_close(cosine(a, b), 1 - (a * b).sum(-1))
    torch.testing.assert_close(spherical(a, -a), torch.full((9,), math.pi**2 / 2, dtype=torch.float64))


@pytest.mark.parametrize("distance", [spherical, cosine])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("offset", [0, 1e-8, 1e-4])
def test_gradients_are_finite_at_the_target_and_at_its_opposite(distance, sign, offset):
    a = torch.nn.functional.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    variable = (sign * a + offset).requires_grad_()
    distance(torch.nn.functional.normalize(variable, dim=-1), a).sum().backward()
    assert variable.grad.isfinite().all() and variable.grad.abs().max() < 10


# -- text loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, distance", [("spherical", spherical), ("cosine", cosine)])
def test_text_loss_is_the_weighted_distance_to_its_texts(clip, weights, name, distance):
    images = pictures()
    loss = text_loss(clip, "a red car | at night:0.5 | rain:-0.25", "fog|snow:3", 0.4, distance=name)
    f = theirs(weights, images)
    d = [distance(f, t) for t in theirs(weights, texts=["a red car", "at night", "rain", "fog", "snow"])]
    expected = (d[0] + 0.5 * d[1] - 0.25 * d[2]) / 1.75 - 0.4 * (d[3] + 3 * d[4]) / 4
    torch.testing.assert_close(gradient(loss, images)[0], expected, rtol=1e-4, atol=1e-5)


def test_descending_the_loss_brings_the_text_closer_and_the_negative_text_farther(clip, weights):
    images, texts = pictures(), theirs(weights, texts=["a red car", "fog"])
    loss = text_loss(clip, "a red car", "fog", 1.0, distance="cosine")
    x = images
    for _ in range(20):
        _, g = gradient(loss, x)
        x = x - 2.0 * g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    before, after = theirs(weights, images) @ texts.T, theirs(weights, x) @ texts.T
    assert ((after - before)[:, 0] > (after - before)[:, 1] + 0.1).all()


@pytest.mark.parametrize(
    "value, texts, weights",
    [
        ("a", ["a"], [1]),
        ("a:2", ["a"], [2]),
        (" a : -0.5 | b:+.5|c:1. ", ["a", "b", "c"], [-0.5, 0.5, 1]),
        ("ratio 16:9 picture", ["ratio 16:9 picture"], [1]),
        ("note: a cat", ["note: a cat"], [1]),
        ("a clock at 12:30:1", ["a clock at 12:30"], [1]),
        ("a:1e3|b:0", ["a:1e3", "b"], [1, 0]),
        ("two\nlines:2\n", ["two\nlines"], [2]),
        ("a:", ["a:"], [1]),
    ],
)
def test_weights_stand_behind_the_last_colon(value, texts, weights):
    assert weighted_texts(value, "text") == (texts, weights)


@pytest.mark.parametrize("value, part", [("", 1), (" \n", 1), ("a||b", 2), ("a|", 2), (":0.5", 1), ("a | :2", 2)])
def test_an_empty_text_is_refused(clip, value, part):
    with pytest.raises(ValueError, match=rf"{TEXT}: there is no text in part {part} of text '"):
        text_loss(clip, value)


def test_weights_that_leave_nothing_are_refused(clip):
    with pytest.raises(ValueError, match=rf"{TEXT}: the weights of text 'a:0\|b:0.0' are all 0"):
        text_loss(clip, "a:0|b:0.0")
    with pytest.raises(ValueError, match=rf"{TEXT}: the weights of negative_text 'a:0' are all 0"):
        text_loss(clip, "a", "a:0")
    with pytest.raises(ValueError, match="too large"):
        text_loss(clip, f"a:{'9' * 400}")
    with pytest.raises(ValueError, match="no text in part 2 of negative_text"):
        text_loss(clip, "a", "b|")


def test_long_texts_are_cut_with_one_warning_that_names_the_limit(clip, weights, caplog):
    long = "word " * 100
    with caplog.at_level(logging.WARNING, "sphereguide"):
        loss = text_loss(clip, f"{long}|{long} more|short")
        gradient(loss, pictures())
        gradient(loss, pictures())
    assert caplog.text.count("reads 77 tokens") == 1
    torch.testing.assert_close(loss.targets[:2], theirs(weights, texts=[long] * 2), rtol=1e-4, atol=1e-5)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sphereguide"):
        text_loss(clip, "word " * 75)
    assert not caplog.text


# -- image loss --------------------------------------------------------------------------------------------------------


def test_references_are_averaged_or_one_per_sample(clip, weights):
    images, references = pictures(5), pictures(2, seed=1)
    f, r = theirs(weights, images), theirs(weights, references)
    image = references.movedim(1, -1)
    average = (spherical(f, r[0]) + spherical(f, r[1])) / 2
    torch.testing.assert_close(gradient(image_loss(clip, image), images)[0], average, rtol=1e-3, atol=1e-5)
    each = spherical(f, r[[0, 1, 0, 1, 0]])
    value, _ = gradient(image_loss(clip, image, "one per sample"), images)
    torch.testing.assert_close(value, each, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(each, average, rtol=1e-2)


def test_a_reference_of_another_size_is_seen_whole_and_without_its_alpha_channel(clip):
    image = torch.rand(1, 60, 90, 4, generator=torch.Generator().manual_seed(0))
    value, _ = gradient(image_loss(clip, image), image[..., :3].movedim(-1, 1))
    torch.testing.assert_close(value, torch.zeros(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("distance", ["spherical", "cosine"])
def test_the_gradient_at_the_reference_itself_is_finite_and_vanishes(clip, distance):
    images = pictures(2)
    image = images.movedim(1, -1)
    _, at = gradient(image_loss(clip, image, "one per sample", distance=distance), images)
    _, away = gradient(image_loss(clip, image.flip(0), "one per sample", distance=distance), images)
    assert at.isfinite().all() and at.abs().max() < 1e-2 * away.abs().max()


# -- cutouts -----------------------------------------------------------------------------------------------------------


def test_cutouts_are_squares_of_the_image_within_their_range():
    height, width = 60, 100
    place = torch.stack(
        [
            torch.arange(height)[:, None].expand(height, width),
            torch.arange(width).expand(height, width),
            torch.ones(height, width),
        ]
    )[None].float()
    sides, centres = [], []
    for index in range(40):
        views = Cutouts(5, 0.3, 0.8, augment=False)(place, (8, 8), Step(index=index))
        assert views.shape == (5, 3, 8, 8)
        # A linear ramp survives resizing away from the borders: its slope tells the size of the cutout.
        down, right = (views[:, 0, 5, 4] - views[:, 0, 3, 4]) / 2 * 8, (views[:, 1, 4, 5] - views[:, 1, 4, 3]) / 2 * 8
        torch.testing.assert_close(down, right, rtol=0.02, atol=0.02)
        sides += down.tolist()
        centres += views[:, 1, 3:5, 3:5].mean((1, 2)).tolist()
    assert 17 < min(sides) < 22 and 44 < max(sides) < 49  # 18 to 48
    assert min(centres) < 20 and max(centres) > 80


def test_seed_and_step_decide_the_cutouts_and_nothing_else(clip):
    cutouts, images = Cutouts(3), pictures(2, 48, 40)
    views = cutouts(images, (32, 32), Step(index=4, seed=7))
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(cutouts(images, (32, 32), Step(index=4, seed=7)), views)
    assert torch.equal(torch.rand(2), expected)  # the workflow's own random numbers are left alone
    for step in (Step(index=5, seed=7), Step(index=4, seed=8), Step(index=4, seed=2**64 - 1)):
        assert not torch.equal(cutouts(images, (32, 32), step), views)
    assert torch.equal(cutouts(images[1:], (32, 32), Step(index=4, seed=7)), views[1::2])


def test_augmentation_is_small(clip):
    images = torch.nn.functional.interpolate(pictures(1, 4, 4), size=(64, 64), mode="bicubic")
    smooth = (images + images.flip(-1)) / 2  # its own mirror image
    for index in range(10):
        plain = Cutouts(2, 1.0, 1.0, augment=False)(smooth, (32, 32), Step(index=index))
        changed = Cutouts(2, 1.0, 1.0, augment=True)(smooth, (32, 32), Step(index=index))
        assert plain.shape == changed.shape
        difference = (plain - changed).flatten(1).square().mean(1).sqrt()
        assert (difference > 0.015).all() and (difference < 0.25).all()


def test_augmentation_mirrors_about_every_second_cutout():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    views = torch.cat([Cutouts(8, 1.0, 1.0)(ramp, (32, 32), Step(index=i)) for i in range(10)])
    rising = (views[..., 24:].mean((1, 2, 3)) > views[..., :8].mean((1, 2, 3))).float().mean()
    assert 0.3 < rising < 0.7


@pytest.mark.parametrize("cutouts", [0, 3])
def test_a_sample_is_judged_alone(clip, cutouts):
    images, step = pictures(3, 48, 40), Step(index=2, seed=5)
    image = pictures(1, seed=3).movedim(1, -1)
    for loss in (text_loss(clip, "a|b:0.5", "c", cutouts=cutouts), image_loss(clip, image, cutouts=cutouts)):
        together, g = gradient(loss, images, step)
        for i in range(3):
            alone, g_alone = gradient(loss, images[i : i + 1], step)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(g[i : i + 1], g_alone, rtol=1e-3, atol=1e-6)


def test_the_loss_is_the_average_over_cutouts(clip, weights):
    images, step = pictures(2, 48, 40), Step(index=1, seed=2)
    views = Cutouts(3)(images, (32, 32), step)
    with torch.inference_mode():
        target = theirs(weights, texts=["a red car"])
    expected = spherical(theirs(weights, views), target).reshape(3, 2).mean(0)
    torch.testing.assert_close(gradient(text_loss(clip, cutouts=3), images, step)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cutouts", [0, 3])
def test_the_gradient_is_that_of_finite_differences(clip, cutouts):
    loss, images, step = text_loss(clip, cutouts=cutouts), pictures(2, 48, 40), Step(index=1)
    _, g = gradient(loss, images, step)
    direction = g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    with torch.no_grad(), torch.inference_mode():
        numeric = (loss(images + 0.05 * direction, step) - loss(images - 0.05 * direction, step)) / 0.1
    torch.testing.assert_close((g * direction).flatten(1).sum(1), numeric, rtol=0.05, atol=1e-5)


def test_gradients_pass_through_the_vae(clip):
    with torch.inference_mode():
        decoder = Decoder(tiny_models.TinyVAE())
    latents = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    for loss in (text_loss(clip, cutouts=2), image_loss(clip, torch.rand(1, 20, 30, 3))):
        with differentiable(loss, decoder.module) as recording, recording():
            variable = latents.clone().requires_grad_()
            (g,) = torch.autograd.grad(loss(decoder(variable), Step()).sum(), variable)
        assert g.isfinite().all() and (g.flatten(1).norm(dim=1) > 0).all()


def test_the_nodes_take_their_views_from_their_widgets(clip):
    views = {"cutouts": 2, "min_size": 0.3, "max_size": 0.8, "augment": False}
    assert text_loss(clip, **views).cutouts == Cutouts(2, 0.3, 0.8, False)
    widgets = {"references": "average", "distance": "cosine", **views}
    assert CLIPImageLoss().make(clip, torch.rand(1, 32, 32, 3), **widgets)[0].cutouts == Cutouts(2, 0.3, 0.8, False)


def test_a_range_of_cutouts_upside_down_is_refused(clip):
    for make, title in ((text_loss, TEXT), (lambda c, **v: image_loss(c, torch.rand(1, 8, 8, 3), **v), IMAGE)):
        with pytest.raises(ValueError, match=rf"{title}: min_size \(0.9\) is above max_size \(0.4\)"):
            make(clip, min_size=0.9, max_size=0.4)


@pytest.mark.parametrize("smallest, largest", [(0, 1), (0.5, 1.5), (0.6, 0.5)])
def test_shares_out_of_range_are_refused(smallest, largest):
    with pytest.raises(ValueError, match="smallest cutout"):
        Cutouts(1, smallest, largest)


def test_an_image_of_a_few_pixels_has_cutouts(clip):
    value, g = gradient(text_loss(clip, cutouts=2, min_size=0.01), pictures(1, 3, 2))
    assert value.isfinite().all() and g.isfinite().all()


# -- nodes -------------------------------------------------------------------------------------------------------------


def test_losses_name_the_network_to_load_and_hold_it(clip):
    for loss, kind in ((text_loss(clip), CLIPText), (image_loss(clip, torch.rand(1, 8, 8, 3)), CLIPImage)):
        assert type(loss) is kind and loss.space == "image"
        assert loss.patchers == (clip.image,) and clip.tower in set(loss.modules())
