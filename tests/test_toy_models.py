"""The demo models behind ComfyUI's stock classes."""

from __future__ import annotations

import shutil

import folder_paths
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sphereguide.demo import judge, portraits, toy_portraits
from sphereguide.models import network
from sphereguide.nodes.clip import LoadOpenCLIP
from sphereguide.nodes.face import LoadFaceEncoder
from sphereguide.nodes.segmentation import LoadSegmentationModel


@pytest.fixture(scope="module")
def toy():
    with torch.inference_mode():  # as nodes run
        return toy_portraits.load()


def encode(clip, text: str) -> torch.Tensor:
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[0]


def test_weights_are_small_fp16_files():
    total = 0
    for name in (toy_portraits.VAE_FILE, toy_portraits.UNET_FILE, toy_portraits.CLIP_FILE):
        tensors = toy_portraits.read(name)
        assert all(t.dtype == torch.float16 or "latent_rgb" in key for key, t in tensors.items())
        total += (toy_portraits.WEIGHTS / name).stat().st_size
    assert total < 16e6


def test_a_truncated_file_is_named(tmp_path):
    data = (toy_portraits.WEIGHTS / toy_portraits.VAE_FILE).read_bytes()
    (tmp_path / toy_portraits.VAE_FILE).write_bytes(data[:1000])
    with pytest.raises(
        ValueError, match=r"The Toy Portraits weights .*vae.safetensors are damaged \(1000 bytes.*Reinstall"
    ):
        toy_portraits.load_vae(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"The Toy Portraits weights .*vae.safetensors are missing\. Reinstall"):
        toy_portraits.load_vae(tmp_path)


@torch.inference_mode()
def test_the_vae_reconstructs_held_out_portraits(toy):
    pixels = np.stack([portraits.render(seed) for seed in portraits.TEST_SEEDS[:16]])
    image = torch.from_numpy(pixels).float() / 255
    latent = toy[2].encode(image)
    assert latent.shape == (16, 4, 16, 16)
    assert abs(float(latent.mean())) < 0.25 and 0.75 < float(latent.std()) < 1.25
    restored = toy[2].decode(latent)
    assert restored.shape == (16, 128, 128, 3)
    psnr = -10 * ((image - restored) ** 2).mean((1, 2, 3)).log10()
    assert float(psnr.mean()) >= 27


@torch.inference_mode()
def test_prompts_encode_as_in_stock_nodes(toy):
    clip = toy[1]
    plain = encode(clip, "a person with red hair")
    assert plain.shape == (1, 77, 128)
    assert encode(clip, "").shape == (1, 77, 128)
    assert not torch.equal(plain, encode(clip, "a person with green hair"))
    assert not torch.equal(plain, encode(clip, "a person with (red:1.3) hair"))
    assert torch.equal(plain, encode(clip, "A PERSON with red  hair"))
    assert encode(clip, "red hair, " * 60).shape[1] % 77 == 0


def test_unknown_words_share_one_token(toy):
    def ids(text: str) -> list[int]:
        return [token for token, weight in toy[1].tokenize(text)["l"][0]]

    assert ids("zebra") == ids("xylophone") != ids("hair")
    assert ids("blond man") == ids("blonde person")


@torch.inference_mode()
def test_samples_have_the_colours_of_the_prompt(toy):
    import comfy.sample

    model, clip, vae = toy
    prompts = {  # prompt: brightest channel of the background's corners and of the top of the head
        "portrait of a person with long red hair, blue background, flat style": (2, 0),
        "portrait of a person with short blue hair, green background, flat style": (1, 2),
        "portrait of a person with curly green hair, orange background, comic style": (0, 1),
    }
    context = torch.cat([encode(clip, text) for text in prompts])
    latent = torch.zeros(len(prompts), 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 3)
    out = comfy.sample.sample(
        model, noise, 20, 3.0, "euler_ancestral", "normal",
        [[context, {}]], [[encode(clip, ""), {}]], latent, disable_pbar=True, seed=3,
    )  # fmt: skip
    images = vae.decode(out)
    for image, (background, hair) in zip(images, prompts.values(), strict=True):
        corners = torch.cat([image[:40, :10].reshape(-1, 3), image[:40, -10:].reshape(-1, 3)]).median(0).values
        assert int(corners.argmax()) == background
        assert int(image[27:34, 54:74].reshape(-1, 3).median(0).values.argmax()) == hair


def test_the_loaders_offer_the_toy_networks_behind_the_users_own(tmp_path, monkeypatch):
    for loader, folder in (
        (LoadOpenCLIP, "open_clip"),
        (LoadSegmentationModel, "segmentation"),
        (LoadFaceEncoder, "face_encoders"),
    ):
        name = next(iter(loader.INPUT_TYPES()["required"]))
        assert "toy_portraits/" in loader.INPUT_TYPES()["required"][name][0]
        own = network.OWN / folder
        (tmp_path / "zebra.safetensors").touch()
        monkeypatch.setattr(folder_paths, "get_folder_paths", {folder: [str(tmp_path), str(own)]}.__getitem__)
        assert network.choices(folder, "*config.json") == ["zebra.safetensors", "toy_portraits/"]
        monkeypatch.undo()


def test_the_users_folder_stays_the_first_however_often_the_loaders_register_it(tmp_path, monkeypatch):
    names = [f"kind_{index}" for index in range(12)]
    for name in names:
        (tmp_path / "own" / name).mkdir(parents=True)
    monkeypatch.setattr(network, "OWN", tmp_path / "own")
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    for name in names * 3:
        network.models_folder(name)
    for name in names:
        assert folder_paths.get_folder_paths(name) == [str(tmp_path / at / name) for at in ("models", "own")]
    registry = folder_paths.folder_names_and_paths
    for name in names:
        del getattr(registry, "contents", registry)[name]


def test_the_toy_open_clip_model_finds_the_caption_of_a_portrait():
    seeds = portraits.TEST_SEEDS[6000:6032]
    captions = [portraits.caption(portraits.sample(seed)) for seed in seeds]
    images = torch.from_numpy(np.stack([portraits.render(seed) for seed in seeds])).movedim(-1, 1).float() / 255
    with torch.inference_mode():
        (clip,) = LoadOpenCLIP().load("toy_portraits/", "fp32")
        similarity = clip.embed_images(images) @ clip.embed_texts(captions).T
    assert (similarity.argmax(1) == torch.arange(32)).float().mean() > 0.9


def test_the_toy_segformer_and_the_toy_face_encoder_see_what_is_there():
    people = [portraits.sample(view, identity=4_000_000 + who) for who in range(24) for view in (1, 2)]
    images = torch.from_numpy(np.stack([portraits.render(p) for p in people])).movedim(-1, 1).float() / 255
    with torch.inference_mode():
        segmenter, labels = LoadSegmentationModel().load("toy_portraits/")
        (face,) = LoadFaceEncoder().load("toy_portraits/", "output")
        logits = F.interpolate(segmenter.network(images[:16]), size=(128, 128), mode="bilinear")
        left, top, right, bottom = (round(128 * share) for share in portraits.FACE_BOX)
        crops = F.interpolate(
            images[..., top:bottom, left:right], size=face.network.size, mode="bicubic", antialias=True
        )
        embeddings = face.network(crops)
    assert [line.partition("=")[0] for line in labels.splitlines()] == list(portraits.CLASSES)
    truth = np.stack([portraits.segment(person) for person in people[:16]])
    assert judge.mean_iou(logits.argmax(1).numpy(), truth)["mean"] > 0.75
    assert judge.verification(embeddings, torch.arange(24).repeat_interleave(2))["auc"] > 0.9
