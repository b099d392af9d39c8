"""`DistillationTrainer` against the loss written out in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from optimum_sparse.recovery import DistillationTrainer, SparsityCallback, TopKCache, keep_sparsity
from optimum_sparse.recovery.distillation import kl_divergence
from optimum_sparse.recovery.teacher_cache import TopK, fingerprint
from tests.helpers import tiny_batches, tiny_model

from .pruned import assert_zeros_kept, pruned_model, zero_positions
from .training import arguments, rows


def batch(padding: bool = True) -> dict[str, torch.Tensor]:
    inputs = dict(tiny_batches(num=1, rows=3, padding=padding)[0])
    inputs["labels"] = inputs["input_ids"].clone()
    if padding:
        inputs["labels"][inputs["attention_mask"] == 0] = -100
    inputs["labels"][:, :4] = -100  # a prompt
    return inputs


def trainer_of(model, output, teacher=None, **options):
    return DistillationTrainer(
        model, arguments(output), train_dataset=rows(), teacher=tiny_model() if teacher is None else teacher, **options
    )


def naive_loss(student, teacher, inputs, kl_weight, temperature, square_head_weight=0.0, k=None):
    """One token at a time, from the definition."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    student, teacher = (m.double()(**inputs, output_hidden_states=True) for m in (student, teacher))
    total, count = 0.0, 0
    for row in range(len(labels)):
        for position in range(labels.shape[1] - 1):
            label = labels[row, position + 1]
            if label == -100:
                continue
            count += 1
            s, t = (out.logits[row, position] for out in (student, teacher))
            p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
            if k is not None:
                kept = p.argsort(descending=True)[:k]
                p, q = (torch.cat([d[kept], 1 - d[kept].sum()[None]]) for d in (p, q))
            kl = (p * (p / q).log()).sum()
            total = total + (1 - kl_weight) * -s.log_softmax(-1)[label] + kl_weight * temperature**2 * kl
    loss = total / count
    if square_head_weight:
        real = inputs.get("attention_mask", torch.ones_like(labels)).bool()
        terms = [
            ((s - t)[real] ** 2).sum() / (t[real] ** 2).sum()
            for s, t in zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
        ]
        loss = loss + square_head_weight * sum(terms) / len(terms)
    return loss


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        dict(kl_weight=1.0, temperature=1.0),
        dict(kl_weight=0.3, temperature=2.0),
        dict(kl_weight=0.0, temperature=1.0),
        dict(kl_weight=0.5, temperature=1.0, square_head_weight=0.7),
        dict(kl_weight=0.0, temperature=1.0, square_head_weight=0.7),
    ],
    ids=["kl", "mixed", "ce", "square head", "square head alone"],
)
def test_loss_and_gradient(options, padding, tmp_path):
    model, inputs = pruned_model(), batch(padding)
    naive = copy.deepcopy(model).double()
    trainer = trainer_of(model, tmp_path, **options)
    loss = trainer.compute_loss(model.train(), inputs)
    expected = naive_loss(naive, tiny_model(), inputs, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("k", [1, 8])
def test_cached_teacher(padding, k, tmp_path):
    model, inputs = pruned_model(), batch(padding)
    options = dict(kl_weight=0.8, temperature=1.5)
    trainer = trainer_of(model, tmp_path, cache=TopKCache(tmp_path / "cache", k=k), **options)
    expected = naive_loss(copy.deepcopy(model), tiny_model(), inputs, k=k, **options).item()
    assert trainer.compute_loss(model.train(), inputs).item() == pytest.approx(expected, rel=1e-5)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3

    def fail(*args, **kwargs):
        raise AssertionError("the teacher was asked again")

    trainer.teacher.forward = fail
    assert trainer.compute_loss(model, inputs).item() == pytest.approx(expected, rel=1e-5)
    one = {name: value[1:2] for name, value in inputs.items()}  # in another batch
    trainer.compute_loss(model, one)
    trainer.temperature = 3.0
    with pytest.raises(AssertionError, match="asked again"):
        trainer.compute_loss(model, inputs)


def test_padding_is_no_part_of_a_cached_text(tmp_path):
    cache, inputs = TopKCache(tmp_path), batch()
    shorter = {name: value[2:3, :14] for name, value in inputs.items()}
    assert inputs["attention_mask"][2].sum() == 14
    assert cache.keys(inputs, "teacher", 1.0)[2:] == cache.keys(shorter, "teacher", 1.0)
    assert len(set(cache.keys(inputs, "teacher", 1.0) + cache.keys(inputs, "other", 1.0))) == 6


def test_a_teacher_is_told_from_another():
    model = tiny_model()
    assert fingerprint(model) == fingerprint(tiny_model()) != fingerprint(tiny_model(seed=1))


def test_the_whole_vocabulary_as_top_k_is_the_divergence_itself():
    student, teacher = torch.randn(5, 30), torch.randn(5, 30)
    whole = kl_divergence(student, teacher, 1.0)
    torch.testing.assert_close(kl_divergence(student, TopK.of(teacher, 30, 1.0), 1.0), whole, rtol=1e-4, atol=1e-4)
    assert kl_divergence(student, TopK.of(teacher, 10, 1.0), 1.0) < whole


def test_gradients_accumulate_over_tokens_not_batches(tmp_path):
    """Two micro-batches with different numbers of tokens are worth as much as one batch of both."""
    inputs = batch()
    results = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        model = pruned_model().train()
        trainer = trainer_of(model, tmp_path, kl_weight=0.5, square_head_weight=0)
        num_items = (inputs["labels"][:, 1:] != -100).sum()
        for part in parts:
            piece = {name: value[part] for name, value in inputs.items()}
            trainer.compute_loss(model, piece, num_items_in_batch=num_items).backward()
        results.append([p.grad for p in model.parameters()])
    for one, several in zip(*results, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-4, atol=1e-6)


def test_evaluation_is_the_cross_entropy(tmp_path):
    model = pruned_model()
    plain = Trainer(copy.deepcopy(model), arguments(tmp_path), eval_dataset=rows(8)).evaluate()["eval_loss"]
    trainer = DistillationTrainer(model, arguments(tmp_path), eval_dataset=rows(8), teacher=tiny_model())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("how", ["full", "lora", "cached", "offloaded"])
def test_the_student_comes_closer_and_stays_sparse(how, tmp_path):
    model, teacher = pruned_model(sparsity=0.3), tiny_model()
    zeros, inputs = zero_positions(model), batch(padding=False)

    def distance(m):
        with torch.no_grad():
            logits = [x(input_ids=inputs["input_ids"]).logits.flatten(0, 1) for x in (m, teacher)]
            return kl_divergence(*logits, 1.0).item()

    before = distance(model)
    if how == "lora":
        model = keep_sparsity(get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")))
    trainer = DistillationTrainer(
        model,
        arguments(tmp_path, max_steps=20, gradient_accumulation_steps=2),
        train_dataset=[{name: value[row] for name, value in inputs.items()} for row in range(3)],
        teacher=teacher,
        cache=TopKCache(tmp_path / "cache", k=100) if how == "cached" else None,
        offload_teacher=how == "offloaded",
        callbacks=[] if how == "lora" else [SparsityCallback(model)],
    )
    trainer.train()
    model = trainer.model.merge_and_unload() if how == "lora" else trainer.model
    assert distance(model.eval()) < 0.5 * before
    assert_zeros_kept(model, zeros)


class TestRefused:
    def test_another_vocabulary(self, tmp_path):
        with pytest.raises(ValueError, match=r"its vocab_size is 256, that of the model is 128"):
            trainer_of(pruned_model(), tmp_path, teacher=tiny_model(vocab_size=256))

    def test_another_depth(self, tmp_path):
        deeper = tiny_model(num_hidden_layers=3)
        trainer_of(pruned_model(), tmp_path, teacher=deeper)
        with pytest.raises(ValueError, match=r"its num_hidden_layers is 3, that of the model is 2"):
            trainer_of(pruned_model(), tmp_path, teacher=deeper, square_head_weight=1)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(kl_weight=1.5), "kl_weight must be between 0 and 1, got 1.5"),
            (dict(temperature=0), "temperature must be above 0, got 0"),
            (dict(square_head_weight=-1), "square_head_weight must not be negative, got -1"),
        ],
        ids=["kl_weight", "temperature", "square_head_weight"],
    )
    def test_out_of_range(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            trainer_of(pruned_model(), tmp_path, **options)

    def test_a_cache_of_hidden_states(self, tmp_path):
        with pytest.raises(ValueError, match="The cache holds no hidden states"):
            trainer_of(pruned_model(), tmp_path, square_head_weight=1, cache=TopKCache(tmp_path))

    def test_no_labels(self, tmp_path):
        model = pruned_model().train()
        with pytest.raises(ValueError, match=r"Distillation needs labels, .* a batch has input_ids"):
            trainer_of(model, tmp_path).compute_loss(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)})

    def test_no_tokens_kept(self, tmp_path):
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            TopKCache(tmp_path, k=0)


def test_a_cache_needs_padding_on_the_right(tmp_path):
    """Elsewhere, a text is another one for some models, and what predicts its first token is padding."""
    inputs = batch()
    inputs = {name: value.flip(1) for name, value in inputs.items()}
    model = pruned_model().train()
    trainer = trainer_of(model, tmp_path, cache=TopKCache(tmp_path / "cache"))
    with pytest.raises(ValueError, match="pad batches on the right"):
        trainer.compute_loss(model, inputs)
