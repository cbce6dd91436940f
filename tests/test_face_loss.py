"""FaceID: the loss against direct computation, where it looks, and the loading of real networks with random weights."""

from __future__ import annotations

import json
import sys

import folder_paths
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sphereguide.losses.base import Step
from sphereguide.losses.face import FaceID, crop, square
from sphereguide.models.decoder import Decoder
from sphereguide.models.face import FaceDetector
from sphereguide.nodes import face as face_nodes
from sphereguide.nodes.face import FaceIDLoss, LoadFaceEncoder
from sphereguide.samplers.autograd import differentiable

timm = pytest.importorskip("timm")
facenet_pytorch = pytest.importorskip("facenet_pytorch")

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": [32, 32], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WHOLE = (0.0, 0.0, 1.0, 1.0)
BOX = (0.25, 0.125, 0.75, 0.875)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/face_encoders, empty."""
    folder = tmp_path / "face_encoders"
    folder.mkdir()
    monkeypatch.setattr(folder_paths, "get_folder_paths", {"face_encoders": [str(folder)]}.__getitem__)
    return folder


def write_timm(folder, name="arcface", num_classes=16, **changes):
    """A folder as timm writes it, and the network in it."""
    torch.manual_seed(0)
    network = timm.create_model(ARCHITECTURE, num_classes=num_classes, **MODEL_ARGS).eval()
    tiny_models.initialise(network)
    (folder / name).mkdir()
    save_file(network.state_dict(), folder / name / "model.safetensors")
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": num_classes,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": MEAN, "std": STD},
        **changes,
    }
    (folder / name / "config.json").write_text(json.dumps(config))
    return network


@pytest.fixture
def network(folder):
    return write_timm(folder)


@pytest.fixture
def encoder(network):
    """FACE_ENCODER of that network, loaded as ComfyUI loads it."""
    return load("arcface/")


def load(name, embedding="output"):
    with torch.inference_mode():
        return LoadFaceEncoder().load(name, embedding)[0]


def make(encoder, image, **changes):
    settings = {"references": "one per sample", "crop": "fixed box", "detect_every": 1, "margin": 0.0}
    box = dict(zip(("box_left", "box_top", "box_right", "box_bottom"), BOX, strict=True))
    with torch.inference_mode():
        return FaceIDLoss().make(encoder, image, **{**settings, **box, "distance": "euclidean", **changes})[0]


def images(batch, height=48, width=64, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def to_image(images):
    return images.movedim(1, -1)


def gradient(loss, estimate, step=None):
    with differentiable(loss) as recording, recording():
        variable = estimate.detach().clone().requires_grad_()
        value = loss(variable, step)
        return value.detach(), torch.autograd.grad(value.sum(), variable)[0]


def embedding(network, image):
    """What `network` makes of the box's pixels, by hand."""
    face = F.interpolate(image[None, :, 6:42, 16:48], size=(32, 32), mode="bilinear", antialias=True)
    normal = (face - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    with torch.no_grad():
        output = network(normal)[0]
    return output / output.norm()


# -- the crop ----------------------------------------------------------------------------------------------------------


def test_each_sample_has_its_own_box():
    x = images(2)
    out = crop(x, [(0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.5, 0.25)], (8, 8))
    first = F.interpolate(x[:1, :, 24:48, 16:48], size=(8, 8), mode="bilinear", antialias=True)
    second = F.interpolate(x[1:, :, 0:12, 0:32], size=(8, 8), mode="bilinear", antialias=True)
    assert torch.equal(out, torch.cat([first, second]))


def test_the_crop_is_antialiased():
    pixel = torch.arange(64)
    fine = ((pixel[:, None] + pixel) % 2).float().expand(1, 3, 64, 64)
    assert (crop(fine, [WHOLE], (8, 8)) - 0.5).abs().max() < 0.01


def test_beyond_the_image_its_border_is_repeated():
    x = images(1, 32, 32)
    out = crop(x, [(-0.25, 0.5, 0.5, 1.25)], (24, 24))
    assert torch.equal(out, F.pad(x[:, :, 16:, :16], (8, 0, 0, 8), mode="replicate"))


def test_a_box_thinner_than_a_pixel_holds_one():
    assert crop(images(1), [(0.5, 0.5, 0.5001, 0.5001)], (4, 4)).isfinite().all()


def test_the_square_about_a_box_is_square_in_pixels():
    left, top, right, bottom = square((0.25, 0.25, 0.5, 0.75), 0.25, 100, 200)
    assert ((right - left) * 200, (bottom - top) * 100) == (75, 75)  # 50 pixels, and a quarter of that on each side
    assert ((left + right) / 2, (top + bottom) / 2) == (0.375, 0.5)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_loss_is_the_distance_of_the_embeddings(network, encoder, distance):
    reference, estimate = images(2, seed=1), images(5)
    loss = make(encoder, to_image(reference), distance=distance)(estimate)
    for i in range(5):
        a, b = embedding(network, estimate[i]), embedding(network, reference[i % 2])
        expected = (a - b).norm() if distance == "euclidean" else 1 - a @ b
        torch.testing.assert_close(loss[i], expected, atol=1e-5, rtol=1e-5)


def test_several_pictures_of_one_person_count_as_their_mean(network, encoder):
    reference, estimate = images(3, seed=1), images(2)
    loss = make(encoder, to_image(reference), references="average")(estimate)
    mean = F.normalize(torch.stack([embedding(network, image) for image in reference]).mean(0), dim=0)
    expected = torch.stack([(embedding(network, image) - mean).norm() for image in estimate])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_whole_image_is_a_crop_too(network, encoder):
    reference = images(1, seed=1)
    loss = make(encoder, to_image(reference), crop="whole image", box_left=1.0)  # the box doesn't count
    assert loss.box == WHOLE
    faces = crop(torch.cat([images(1), reference]), [WHOLE] * 2, (32, 32))
    a, b = encoder.network(faces)
    torch.testing.assert_close(loss(images(1)), (a - b).norm()[None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_gradient_is_that_of_finite_differences(encoder, distance):
    loss = make(encoder, to_image(images(2, seed=1)), distance=distance)
    with torch.inference_mode():
        loss.double()
    estimate = images(2).double()
    direction = torch.randn(estimate.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, found = gradient(loss, estimate)
    numeric = (loss(estimate + 1e-6 * direction) - loss(estimate - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((found * direction).flatten(1).sum(1), numeric, rtol=1e-5, atol=1e-7)
    assert (found.flatten(1).norm(dim=1) > 1e-4).all()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_reference_itself_costs_nothing_and_has_a_gradient_of_zero(encoder, distance):
    reference = images(1)
    value, found = gradient(make(encoder, to_image(reference), distance=distance), reference)
    torch.testing.assert_close(value, torch.zeros(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


def test_nothing_outside_the_box_has_a_gradient(encoder):
    _, found = gradient(make(encoder, to_image(images(1, seed=1))), images(1))
    inside = torch.zeros_like(found, dtype=torch.bool)
    inside[..., 6:42, 16:48] = True
    assert (found[inside] != 0).float().mean() > 0.9
    assert torch.equal(found[~inside], torch.zeros_like(found[~inside]))


def test_a_sample_has_the_loss_and_gradient_that_it_has_alone(encoder):
    reference, estimates = images(1, seed=1), images(3)
    loss = make(encoder, to_image(reference))
    loss.detector = Faces([[(0.1 * i, 0.2, 0.5 + 0.1 * i, 0.9)] for i in range(3)])
    together = gradient(loss, estimates)
    for i in range(3):
        loss.detector = Faces([[(0.1 * i, 0.2, 0.5 + 0.1 * i, 0.9)]])
        value, found = gradient(loss, estimates[i : i + 1])
        torch.testing.assert_close(value[0], together[0][i])
        torch.testing.assert_close(found[0], together[1][i], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision_are_judged_in_the_networks(encoder, dtype):
    loss = make(encoder, to_image(images(1, seed=1)))
    estimate = images(2).to(dtype)
    value, found = gradient(loss, estimate)
    assert value.dtype == torch.float32 and found.dtype == dtype
    torch.testing.assert_close(value, loss(estimate.float()))
    assert found.isfinite().all() and (found != 0).any()


def test_the_gradient_goes_through_the_vae(encoder):
    with torch.inference_mode():
        decoder = Decoder(tiny_models.TinyVAE())
    loss = make(encoder, to_image(images(1, 64, 64, seed=1)))
    with differentiable(loss, decoder.module) as recording, recording():
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (found,) = torch.autograd.grad(loss(decoder(latents)).sum(), latents)
    assert found.isfinite().all() and (found.flatten(1).norm(dim=1) > 0).all()


def test_the_network_is_listed_for_the_sampler_to_load(encoder):
    loss = make(encoder, to_image(images(1)))
    assert loss.patchers == (encoder.patcher,)
    assert encoder.patcher.model is loss.encoder
    assert not any(parameter.requires_grad or parameter.grad_fn for parameter in loss.parameters())
    assert not loss.encoder.training


# -- detection ---------------------------------------------------------------------------------------------------------


class Faces:
    """A detector that answers from a list, in turn."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, image):
        assert image.ndim == 3 and not image.requires_grad
        self.asked += 1
        return self.answers.pop(0)


FACE = (0.25, 0.25, 0.5, 0.5)
OTHER = (0.5, 0.25, 0.75, 0.5)


@pytest.fixture
def seeking(encoder):
    """A loss with a detector, looking again after two guided steps, and the boxes that it cropped."""

    def seek(answers, every=2):
        with torch.inference_mode():
            reference = images(1, 64, 64, seed=1)
            loss = FaceID(
                encoder.network, reference, [WHOLE], box=BOX, detector=Faces(answers), every=every, margin=0.0
            )
        cropped, embed = [], loss.embed
        loss.embed = lambda images, boxes: cropped.append(list(boxes)) or embed(images, boxes)
        return loss, cropped

    return seek


def test_a_face_is_looked_for_again_every_k_guided_steps(seeking):
    loss, cropped = seeking([[FACE], [OTHER]])
    memory = {}
    for index in (0, 5, 5, 10, 15):  # guided at an interval of 5, twice in one step
        loss(images(1, 64, 64), Step(index=index, memory=memory))
    assert cropped == [[FACE], [FACE], [FACE], [OTHER], [OTHER]]
    assert loss.detector.asked == 2


def test_where_none_is_found_the_last_box_holds_and_before_that_the_fixed_one(seeking):
    loss, cropped = seeking([[], [FACE], [], [OTHER], [OTHER], []], every=1)
    memory = {}
    for index in range(3):
        loss(images(2, 64, 64), Step(index=index, memory=memory))
    assert cropped == [[BOX, FACE], [BOX, OTHER], [OTHER, OTHER]]


def test_of_several_faces_the_first_counts(seeking):
    loss, cropped = seeking([[OTHER, FACE]])
    loss(images(1, 64, 64), Step())
    assert cropped == [[OTHER]]


def test_a_run_remembers_nothing_of_the_last(seeking):
    loss, cropped = seeking([[FACE], []])
    before = {name: value for name, value in vars(loss).items() if name != "detector"}
    loss(images(1, 64, 64), Step(memory={}))
    loss(images(1, 64, 64), Step(memory={}))
    assert cropped == [[FACE], [BOX]]
    assert {name: value for name, value in vars(loss).items() if name != "detector"} == before


def test_another_number_of_samples_is_looked_at_afresh(seeking):
    loss, cropped = seeking([[FACE], [FACE], [OTHER]])
    memory = {}
    loss(images(1, 64, 64), Step(memory=memory))
    loss(images(2, 64, 64), Step(memory=memory))
    assert cropped == [[FACE], [FACE, OTHER]]


def test_the_detected_box_is_made_square_and_wider(seeking):
    loss, cropped = seeking([[(0.25, 0.25, 0.5, 0.75)]])
    loss.margin = 0.25
    loss(images(1, 64, 64), Step())
    assert cropped == [[square((0.25, 0.25, 0.5, 0.75), 0.25, 64, 64)]]


# -- the detector ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector():
    with torch.inference_mode():
        return FaceDetector("FaceID Loss")


def test_the_detector_leaves_the_random_numbers_of_the_workflow_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    FaceDetector("FaceID Loss")(images(1, 64, 64)[0])
    assert torch.equal(torch.rand(2), expected)


def test_the_detector_leaves_gradient_and_inference_mode_as_they_were(detector):
    with torch.enable_grad():
        detector(images(1, 64, 64)[0].requires_grad_())
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.full((3, 64, 64), torch.nan), torch.zeros(3, 64, 300)])
def test_an_image_that_can_show_no_face_shows_none(detector, image):
    assert detector(image) == []


def test_a_detector_that_fails_says_so(detector, monkeypatch):
    def fails(pixels):
        raise RuntimeError("not enough memory: you tried to allocate 40000000000 bytes")

    monkeypatch.setattr(detector.mtcnn, "detect", fails)
    with pytest.raises(RuntimeError, match="not enough memory"):
        detector(images(1, 64, 64)[0])


# -- nodes -------------------------------------------------------------------------------------------------------------


class TwoFaces(Faces):
    def __init__(self, title):
        super().__init__([[OTHER, FACE]])


def test_a_reference_without_a_face_is_refused_by_its_number(encoder, monkeypatch):
    with pytest.raises(ValueError, match=r"no face found on the reference\."):
        make(encoder, torch.zeros(1, 64, 64, 3), crop="detect")
    monkeypatch.setattr(face_nodes, "FaceDetector", lambda title: Faces([[FACE], []]))
    with pytest.raises(ValueError, match=r"no face found on reference 2 of 2.*crop to 'fixed box'"):
        make(encoder, torch.zeros(2, 64, 64, 3), crop="detect")


def test_of_several_faces_in_a_reference_the_largest_is_taken_with_a_warning(encoder, monkeypatch, caplog, network):
    reference = images(1, 64, 64)
    monkeypatch.setattr(face_nodes, "FaceDetector", TwoFaces)
    loss = make(encoder, to_image(reference), crop="detect", detect_every=0)
    assert "the reference shows 2 faces, of which the largest counts" in caplog.text
    expected = encoder.network(crop(reference, [OTHER], (32, 32)))
    torch.testing.assert_close(loss.reference, expected)


def test_detect_every_0_looks_at_the_reference_only(encoder, monkeypatch):
    monkeypatch.setattr(face_nodes, "FaceDetector", TwoFaces)
    loss = make(encoder, to_image(images(1, 64, 64)), crop="detect", detect_every=0)
    assert loss.detector is None and loss.box == BOX


def test_detection_is_as_often_and_as_wide_as_the_widgets_say(encoder, monkeypatch, network):
    monkeypatch.setattr(face_nodes, "FaceDetector", TwoFaces)
    reference = images(1, 64, 64)
    loss = make(encoder, to_image(reference), crop="detect", detect_every=3, margin=0.5)
    assert (loss.every, loss.margin) == (3, 0.5) and loss.detector is not None
    wider = encoder.network(crop(reference, [square(OTHER, 0.5, 64, 64)], (32, 32)))
    torch.testing.assert_close(loss.reference, wider)


def test_an_empty_box_is_refused(encoder):
    with pytest.raises(ValueError, match=r"the box from \(0.8, .*is empty. Left must be below right"):
        make(encoder, to_image(images(1)), box_left=0.8)


# -- the loader --------------------------------------------------------------------------------------------------------


def test_timms_network_gets_the_preprocessing_of_its_config(encoder, network):
    face = images(1, 32, 32)
    seen = []
    handle = encoder.network.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder.network(face)
    handle.remove()
    assert encoder.network.size == (32, 32)
    torch.testing.assert_close(
        seen[0], (face - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    )


def test_features_are_what_enters_the_last_layer(folder, network):
    face = images(2, 32, 32)
    with torch.no_grad():
        expected = F.normalize(
            network.forward_head(network.forward_features((face - 0.5) / 0.5), pre_logits=True), dim=1
        )
    encoder = load("arcface/", "features").network
    encoder.mean, encoder.std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)
    torch.testing.assert_close(encoder(face), expected, atol=1e-5, rtol=1e-5)
    assert encoder(face).shape == (2, 24)


def test_a_network_without_a_head_gives_its_features(folder):
    write_timm(folder, "headless", num_classes=0)
    assert load("headless/").network(images(1, 32, 32)).shape == (1, 24)


def test_facenet_sees_what_it_was_trained_on(folder):
    torch.manual_seed(0)
    theirs = facenet_pytorch.InceptionResnetV1(pretrained=None, classify=False).eval()
    head = {"logits.weight": torch.zeros(8631, 512), "logits.bias": torch.zeros(8631)}
    torch.save({**theirs.state_dict(), **head}, folder / "20180402-114759-vggface2.pt")
    torch.manual_seed(1)
    expected_draw = torch.rand(1)
    torch.manual_seed(1)
    encoder = load("20180402-114759-vggface2.pt").network
    assert torch.equal(torch.rand(1), expected_draw)
    assert encoder.size == (160, 160)
    face = images(1, 160, 160)
    with torch.no_grad():
        expected = theirs(facenet_pytorch.fixed_image_standardization(face * 255))
    torch.testing.assert_close(encoder(face), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder(face).norm(dim=1), torch.ones(1))


def test_the_list_holds_files_and_folders_and_says_when_it_is_empty(folder):
    listed = lambda: LoadFaceEncoder.INPUT_TYPES()["required"]["name"][0]  # noqa: E731
    assert listed() == ["models/face_encoders is empty"]
    with pytest.raises(
        FileNotFoundError, match=r"models/face_encoders.*https://github.com/timesler/facenet-pytorch/rel"
    ):
        load("models/face_encoders is empty")
    write_timm(folder)
    (folder / "20180402-114759-vggface2.pt").touch()
    assert listed() == ["20180402-114759-vggface2.pt", "arcface/"]


def test_weights_of_another_network_are_refused(folder):
    save_file({"fc.weight": torch.zeros(2, 2)}, folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"Load Face Encoder: .*other.safetensors does not fit .*InceptionResnetV1"):
        load("other.safetensors")
    write_timm(folder, "wrong", model_args={**MODEL_ARGS, "depth": 3})
    with pytest.raises(ValueError, match=r"model.safetensors does not fit .*vit_tiny"):
        load("wrong/")


def test_broken_folders_are_refused(folder):
    write_timm(folder, "unknown", architecture="nonet50")
    with pytest.raises(ValueError, match="knows no architecture 'nonet50'"):
        load("unknown/")
    write_timm(folder, "online", architecture="hf-hub:someone/something")
    with pytest.raises(ValueError, match="knows no architecture 'hf-hub:someone/something'"):
        load("online/")
    write_timm(folder, "weightless")
    (folder / "weightless" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has a config.json, but no model.safetensors"):
        load("weightless/")
    (folder / "online" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json can't be read"):
        load("online/")


@pytest.mark.parametrize("package, name", [("facenet_pytorch", "face.pt"), ("timm", "arcface/")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(folder, monkeypatch, package, name):
    write_timm(folder)
    torch.save({}, folder / "face.pt")
    monkeypatch.setitem(sys.modules, package, None)
    command = {"facenet_pytorch": "pip install --no-deps facenet-pytorch", "timm": "pip install timm"}[package]
    with pytest.raises(ImportError, match=f"Load Face Encoder needs the Python package {package}.*{command}"):
        load(name)


def test_detection_without_facenet_pytorch_says_how_to_get_it(encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ImportError, match=r"FaceID Loss needs .*pip install --no-deps facenet-pytorch"):
        make(encoder, to_image(images(1)), crop="detect")
    make(encoder, to_image(images(1)))  # the other crops don't need it
