"""Images and sound through a processor."""

import json

import datasets
import numpy
import pytest
import torch
from transformers import ProcessorMixin, WhisperFeatureExtractor, WhisperProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

from optimum_sparse.calibration import load_calibration
from optimum_sparse.config import SparseConfig
from tests.beyond_text import FRAMES, MELS, MODELS
from tests.helpers import tiny_model

from .helpers import DOCUMENTS, TEXT_ROWS, WINDOWS, load, rows, word_tokenizer, write_jsonl

RATE = 16_000  # of sound, in Hz


class Pixels(ImageProcessingMixin):
    """Cuts images of 20 x 24 pixels, `[20, 24, 3]`, to 16 x 16; unlike Transformers' own, without Pillow."""

    model_input_names = ("pixel_values",)

    def __call__(self, images, scale=255, return_tensors=None):
        images = torch.from_numpy(numpy.asarray(images).reshape(-1, 20, 24, 3))
        pixels = (images[:, :16, :16] / scale).permute(0, 3, 1, 2).float()
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def random_images(count: int) -> numpy.ndarray:
    return numpy.random.RandomState(0).randint(0, 256, (count, 20, 24, 3), dtype=numpy.uint8)


def whisper_processor() -> WhisperProcessor:
    extractor = WhisperFeatureExtractor(feature_size=MELS, chunk_length=1, hop_length=RATE // FRAMES)
    return WhisperProcessor(extractor, word_tokenizer())


def test_images_by_an_image_processor():
    model, _ = MODELS["vit"]()
    images = random_images(4)
    items = [{"images": images[0]}, {"images": list(images[1:3])}, {"images": images[3]}]
    calibration = load_calibration(SparseConfig(num_samples=3), model, Pixels(), items)
    expected = torch.from_numpy(images[:3, :16, :16] / 255).permute(0, 3, 1, 2).float()
    assert [len(batch["pixel_values"]) for batch in calibration.batches] == [1, 2]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in calibration.batches]), expected)
    assert calibration.record["dataset"] == "3 items"
    assert calibration.record["num_samples"] == 3
    assert json.loads(json.dumps(calibration.record)) == calibration.record
    assert model(**calibration.batches[0]).logits.isfinite().all()


def test_images_by_a_processor_of_transformers():
    pytest.importorskip("PIL", reason="the image processors of Transformers need Pillow")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model, _ = MODELS["vit"]()
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = random_images(2)
    calibration = load_calibration(
        SparseConfig(num_samples=2), model, processor, [{"images": image} for image in images]
    )
    expected = processor(images=list(images), return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in calibration.batches]), expected)
    assert model(**calibration.batches[0]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["dataset", "stream", "jsonl"])
def test_rows_with_images(tmp_path, kind):
    model, _ = MODELS["vit"]()
    images = random_images(2)
    data = datasets.Dataset.from_list([{"images": image.tolist(), "scale": 255} for image in images])
    if kind == "stream":
        data = data.to_iterable_dataset()
    elif kind == "jsonl":
        data = write_jsonl(tmp_path / "data.jsonl", list(data))
    calibration = load_calibration(SparseConfig(num_samples=2), model, Pixels(), data)
    found = torch.cat([batch["pixel_values"] for batch in calibration.batches])
    expected = Pixels()(list(images), return_tensors="pt")["pixel_values"]
    assert sorted(found.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())  # a stream is shuffled


def test_sound_and_text_by_a_processor():
    model, _ = MODELS["whisper"]()
    processor = whisper_processor()
    sound = numpy.sin(numpy.arange(4000) / 7).astype(numpy.float32)
    item = {"audio": sound, "sampling_rate": RATE, "text": "10 11 12"}
    calibration = load_calibration(SparseConfig(num_samples=1), model, processor, item)
    (batch,) = calibration.batches
    expected = processor.feature_extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch["input_features"], expected)
    assert expected.shape == (1, MELS, FRAMES)
    assert batch["labels"].tolist() == [[10, 11, 12]]
    assert "decoder" not in calibration.record
    assert model(**batch).loss.isfinite()


def test_sound_without_text_leaves_the_decoder_without_inputs():
    model, _ = MODELS["whisper"]()
    item = {"raw_speech": numpy.zeros(4000), "sampling_rate": RATE}
    extractor = whisper_processor().feature_extractor
    with pytest.raises(ValueError, match=r"Batch 0 .* nothing for the decoder of Whisper.*\[input_features\].*'text'"):
        load_calibration(SparseConfig(num_samples=1), model, extractor, [item])


def test_what_a_processor_makes_has_the_type_of_the_model():
    model = MODELS["vit"]()[0].bfloat16()
    calibration = load_calibration(SparseConfig(num_samples=1), model, Pixels(), {"images": random_images(1)[0]})
    assert calibration.batches[0]["pixel_values"].dtype == torch.bfloat16
    assert model(**calibration.batches[0]).logits.isfinite().all()


def test_text_with_a_processor(llama):
    processor = whisper_processor()
    for data in (DOCUMENTS, datasets.Dataset.from_list(TEXT_ROWS)):
        assert rows(load_calibration(SparseConfig(seqlen=4, num_samples=2), llama, processor, data)) == WINDOWS
    with pytest.raises(ValueError, match=r"\(3 texts\) are text, but Pixels has no tokenizer"):
        load_calibration(SparseConfig(), llama, Pixels(), DOCUMENTS)


def test_ready_batches_are_not_processed():
    model, batches = MODELS["vit"]()
    calibration = load_calibration(SparseConfig(num_samples=6), model, Pixels(), batches)
    assert all(
        batch["pixel_values"].equal(given["pixel_values"])
        for batch, given in zip(calibration.batches, batches, strict=True)
    )
    assert rows(load_calibration(SparseConfig(), tiny_model(), whisper_processor(), {"input_ids": [5, 6]})) == [[5, 6]]


@pytest.mark.parametrize(
    ("item", "cause", "message"),
    [
        ({"image": 1}, TypeError, r"keys \[image\] \(TypeError: .*'image'.*\(images, scale, return_tensors\): rename"),
        ({"images": "?"}, ValueError, r"keys \[images\] \("),
        ({"images": numpy.zeros((20, 24, 3)), "return_tensors": "np"}, TypeError, r"multiple values"),
    ],
)
def test_item_that_the_processor_refuses(item, cause, message):
    model, _ = MODELS["vit"]()
    data = [{"images": random_images(1)[0]}, item]
    with pytest.raises(ValueError, match=rf"(?s)Pixels refuses item 1 of the calibration data, .*{message}") as caught:
        load_calibration(SparseConfig(), model, Pixels(), data)
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize(("key", "value"), [("image", "photo.png"), ("picture", [1])])
def test_what_a_processor_would_ignore_is_refused(key, value):
    """Those of Transformers take any keyword, and go on without it if they do not know it."""

    class Both(ProcessorMixin):
        model_input_names = ("input_ids", "pixel_values")

        def __init__(self):
            self.seen = []

        def __call__(self, images=None, text=None, return_tensors=None, **options):
            self.seen.append(options)
            return {"input_ids": torch.tensor([[5, 6]]), "pixel_values": torch.ones(1, 3)}

    processor, options = Both(), {"padding": True, "size": {"height": 2}, "suffix": "10"}
    data = [{"text": "10", "images": [1], **options}, {"text": "11", key: value}]
    with pytest.raises(
        ValueError, match=rf"item 1 .* no argument '{key}'\).* \(images, text, return_tensors\): rename"
    ):
        load_calibration(SparseConfig(), tiny_model(), processor, data)
    assert processor.seen == [options]


def test_images_without_a_processor(llama):
    with pytest.raises(ValueError, match=r"no 'input_ids' in item 0 .* \[images\]: .* the model's processor"):
        load([{"images": random_images(1)[0].tolist()}], model=llama)
    with pytest.raises(ValueError, match=r"0 of \[images\] hold strings.* processor instead"):
        load(datasets.Dataset.from_dict({"images": [[1]]}), model=llama)
