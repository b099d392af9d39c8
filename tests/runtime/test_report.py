"""What a person reads of the choices."""

from dataclasses import replace

from optimum_sparse.runtime.report import LayerChoice, RuntimeReport

FAST = LayerChoice(
    ["mlp.{0-1}.up"], 2, (64, 32), "bfloat16", 0.5, "sparse", None, {"torch": 9.0, "sparse": 4.0}, 8192, 4608
)


def test_all_layers_that_have_a_reason_are_named_with_it() -> None:
    small = replace(FAST, names=["gate"], choice="torch", reason="too small", microseconds={}, bytes=8192)
    layers = [FAST, small, replace(small, names=["a", "b"]), replace(small, names=["c"], reason="too dense")]
    text = str(RuntimeReport(1, "avx2", None, 2, layers, {"conv": "is no linear layer"}))
    assert text.splitlines()[-3:] == ["gate, a, b: too small", "c: too dense", "conv: is no linear layer"]
    assert "kernels: avx2, 2 threads, batch size 1" in text
    # 4608 of 8192 bytes, and three times all of 8192
    assert "29,184 of 32,768 bytes (89%)" in text


def test_each_name_has_the_number_of_layers_that_it_stands_for() -> None:
    layer = replace(FAST, names=["h.{0-2}.gate", "h.{0,2}.up", "head"], count=6)
    rows = str(RuntimeReport(1, "avx2", None, 2, [layer], {})).splitlines()[2:5]
    assert [row.split()[:2] for row in rows] == [["h.{0-2}.gate", "3"], ["h.{0,2}.up", "2"], ["head", "1"]]
