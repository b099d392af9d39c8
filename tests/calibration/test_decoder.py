"""What encoders and decoders are given."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    T5EncoderModel,
    WhisperForAudioClassification,
)

from optimum_sparse.calibration import load_calibration
from optimum_sparse.config import SparseConfig
from tests.beyond_text import MODELS, random_model
from tests.helpers import VOCABULARY

from .helpers import DOCUMENTS, WINDOWS, load, word_tokenizer, words


def shifted(row: list[int], start: int) -> list[int]:
    return [start, *row[:-1]]


@pytest.mark.parametrize(("name", "start"), [("t5", 0), ("bart", 2)])
@pytest.mark.parametrize(
    "data", [DOCUMENTS, [{"input_ids": row} for row in WINDOWS], "DataLoader"], ids=["texts", "tokens", "DataLoader"]
)
def test_decoder_reads_the_windows_shifted_right(name, start, data):
    model, _ = MODELS[name]()
    given = {"input_ids": torch.tensor(WINDOWS)}
    calibration = load(iter([given]) if data == "DataLoader" else data, model=model, seqlen=4, num_samples=2)
    (batch,) = calibration.batches
    assert batch["input_ids"].tolist() == WINDOWS
    assert batch["decoder_input_ids"].tolist() == [shifted(row, start) for row in WINDOWS]
    assert calibration.record["decoder"] == "the windows themselves, shifted right"
    assert calibration.record["num_tokens"] == 8
    assert set(given) == {"input_ids"}  # the user's own batch is left alone
    # By the model itself: BART from the input, T5 from labels.
    own = model(**given) if name == "bart" else model(**given, labels=given["input_ids"])
    assert torch.equal(model(**batch).logits, own.logits)


def test_decoder_of_a_model_that_cannot_shift():
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sizes |= dict(vocab_size=VOCABULARY, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32)
    config = AutoConfig.for_model("m2m_100", decoder_start_token_id=2, **sizes)
    model = random_model(lambda: AutoModelForSeq2SeqLM.from_config(config))
    assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
    (batch,) = load(DOCUMENTS, model=model, seqlen=4, num_samples=2).batches
    assert batch["decoder_input_ids"].tolist() == [shifted(row, 2) for row in WINDOWS]
    assert model(**batch).logits.isfinite().all()
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match=r"M2M100.* has no config.decoder_start_token_id .* 'decoder_input_ids'"):
        load(DOCUMENTS, model=model, seqlen=4, num_samples=2)


def test_tokens_for_the_decoder_are_kept():
    model, batches = MODELS["t5"]()
    data = [
        {"input_ids": [5, 6, 7], "labels": [8, 9], "token_type_ids": [0, 0, 0]},
        {"input_ids": [[10, 11, 12]], "labels": [[13, -100]]},
        {"input_ids": [14, 15, 16], "labels": [17]},
        {"input_ids": [18, 19, 20], "attention_mask": [1, 1, 0], "decoder_input_ids": [0, 21]},
    ]
    calibration = load(data, model=model, num_samples=4)
    assert [{name: value.tolist() for name, value in batch.items()} for batch in calibration.batches] == [
        {"input_ids": [[5, 6, 7], [10, 11, 12]], "labels": [[8, 9], [13, -100]]},
        {"input_ids": [[14, 15, 16]], "labels": [[17]]},
        {"input_ids": [[18, 19, 20]], "attention_mask": [[1, 1, 0]], "decoder_input_ids": [[0, 21]]},
    ]
    assert "decoder" not in calibration.record
    assert all(model(**batch).logits.isfinite().all() for batch in calibration.batches)
    calibration = load_calibration(SparseConfig(num_samples=6), model, None, iter(batches))
    assert all(batch["decoder_input_ids"].shape == (2, 16) for batch in calibration.batches)
    with pytest.raises(ValueError, match=r"'labels' in item 0 .* has 1 rows, but 'input_ids' has 2"):
        load({"input_ids": [[5, 6], [7, 8]], "labels": [9, 10]}, model=model)


def test_encoder_alone_needs_nothing_for_a_decoder():
    model = T5EncoderModel(MODELS["t5"]()[0].config)
    calibration = load(DOCUMENTS, model=model, seqlen=4, num_samples=2)
    assert set(calibration.batches[0]) == {"input_ids"}
    assert "decoder" not in calibration.record
    whisper, batches = MODELS["whisper"]()
    model = WhisperForAudioClassification(whisper.config)
    assert model.config.is_encoder_decoder
    data = [{"input_features": batch["input_features"]} for batch in batches]
    calibration = load_calibration(SparseConfig(num_samples=6), model, None, data)
    assert all(set(batch) == {"input_features"} for batch in calibration.batches)


def test_positions_of_roberta_are_counted_from_behind_padding():
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, pad_token_id=1)
    config = AutoConfig.for_model("roberta", max_position_embeddings=34, num_attention_heads=2, **sizes)
    model = random_model(lambda: AutoModelForMaskedLM.from_config(config))
    calibration = load([words([7] * 40)], word_tokenizer(eos=False, sep=True), model, num_samples=1)
    assert calibration.record["seqlen"] == 32
    assert model(**calibration.batches[0]).logits.shape == (1, 32, VOCABULARY)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, 33), 7))
