"""One number per prompt from logits: against sums written out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from interp.errors import InputError
from interp.metrics import METRICS, Metric, kl_divergence

# rows: 3 prompts, columns: 4 tokens
LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 2.0]])
PROMPTS = SimpleNamespace(answers=(3, 1, 0), distractors=(1, 0, 3))


def value(name: str, reference: torch.Tensor | None = None) -> list[float]:
    return Metric.parse(name).reader(PROMPTS, reference)(LOGITS).tolist()


def test_logit_diff() -> None:
    assert value("logit_diff") == [2.0, -5.0, -1.0]  # 3 - 1, 0 - 5, 1 - 2


def test_answer_probability_and_its_logarithm() -> None:
    # softmax by hand: e^3 / (1 + e + e^2 + e^3), 1 / (e^5 + 3), e / (3 e + e^2)
    e = math.e
    wanted = [e**3 / (1 + e + e**2 + e**3), 1 / (e**5 + 3), e / (3 * e + e**2)]
    assert value("answer_prob") == pytest.approx(wanted)
    assert value("answer_logprob") == pytest.approx([math.log(p) for p in wanted])


def test_accuracy_is_over_the_whole_vocabulary() -> None:
    assert value("accuracy") == [1.0, 0.0, 0.0]


def test_kl_runs_from_the_reference_to_the_run() -> None:
    reference = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    # prompt 0 and 2 equal up to a constant: 0. Prompt 1: sum 1/4 (log 1/4 - log q) with q = (e^5, 1, 1, 1) / (e^5 + 3)
    got = value("kl", reference)
    assert got[0] == 0.0 and abs(got[2]) < 1e-6
    assert got[1] == pytest.approx(-math.log(4) + math.log(math.e**5 + 3) - 5 / 4, rel=1e-6)


def test_reading_columns_is_reading_everything() -> None:
    reader = METRICS["logit_diff"].reader(PROMPTS)
    assert reader.columns is not None and reader.columns.tolist() == [[3, 1], [1, 0], [0, 3]]
    picked = torch.stack([LOGITS[i, c] for i, c in enumerate(reader.columns)])
    assert torch.equal(reader.values(picked), reader(LOGITS))
    assert METRICS["answer_prob"].reader(PROMPTS).columns is None


def test_some_of_the_prompts() -> None:
    reference = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for name in METRICS:
        reader = METRICS[name].reader(PROMPTS, reference)
        for rows in (slice(1, 3), [2, 0], torch.tensor([1])):
            assert torch.equal(reader[rows](LOGITS[rows]), reader(LOGITS)[rows])


def test_half_precision_is_computed_in_full() -> None:
    logits = LOGITS.bfloat16()
    assert Metric.parse("answer_logprob").reader(PROMPTS)(logits).dtype == torch.float32
    assert torch.equal(Metric.parse("answer_logprob").reader(PROMPTS)(logits), Metric.parse("answer_logprob").reader(PROMPTS)(LOGITS))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_text_forms_round_trip(name: str) -> None:
    for text in (name, f"{name}@S2", f"{name}@-2", f"{name}@3"):
        metric = Metric.parse(text)
        assert str(metric) == text and Metric.parse(str(metric)).position == metric.position
    assert Metric.parse(f"{name}@3").position == 3 and Metric.parse(f"{name}@S2").position == "S2" and Metric.parse(name).position == "END"
    assert Metric.parse(METRICS[name]) is METRICS[name]


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(InputError, match="no metric named 'logit_dif'; nearest: logit_diff"):
        Metric.parse("logit_dif")
    with pytest.raises(InputError, match="there are: logit_diff, answer_logprob"):
        Metric.parse("xyzzy")


def test_missing_answers_distractors_and_reference() -> None:
    with pytest.raises(InputError, match="logit_diff needs one distractor token per prompt"):
        Metric.parse("logit_diff").reader(SimpleNamespace(answers=(1,), distractors=None))
    with pytest.raises(InputError, match="answer_prob needs one answer token per prompt"):
        Metric.parse("answer_prob").reader(SimpleNamespace(answers=None, distractors=None))
    with pytest.raises(InputError, match="kl needs the logits of a reference run"):
        Metric.parse("kl").reader(PROMPTS)


def test_a_function_of_the_users() -> None:
    def surprise(logits: torch.Tensor, targets: object) -> torch.Tensor:
        return logits.logsumexp(-1)

    metric = Metric.parse(surprise)
    assert str(metric) == "user function" and metric.name == "surprise"
    assert torch.equal(metric.reader(PROMPTS)(LOGITS), LOGITS.logsumexp(-1))
    with pytest.raises(InputError, match=r"one value per prompt, shape \[3\], and gave \[\]"):
        Metric.parse(lambda logits, targets: logits.sum()).reader(PROMPTS)(LOGITS)
    with pytest.raises(InputError, match="gave float"):
        Metric.parse(lambda logits, targets: 1.0).reader(PROMPTS)(LOGITS)


def test_logits_that_are_not_finite_are_refused() -> None:
    broken = LOGITS.clone()
    broken[1] = torch.nan
    for name in METRICS:
        with pytest.raises(InputError, match="NaN on prompt 1"):
            METRICS[name].reader(PROMPTS, LOGITS)(broken)


def test_answers_outside_the_vocabulary_and_wrong_shapes() -> None:
    for name in ("logit_diff", "answer_prob", "accuracy"):
        with pytest.raises(InputError, match="token 9"):
            METRICS[name].reader(SimpleNamespace(answers=(9, 1, 1), distractors=(0, 0, 0)))(LOGITS)
    with pytest.raises(ValueError, match=r"\[prompt vocab\], not \[1, 3, 4\]"):
        METRICS["logit_diff"].reader(PROMPTS)(LOGITS[None])
    with pytest.raises(ValueError, match="reference has logits"):
        METRICS["kl"].reader(PROMPTS, LOGITS[:, :3])(LOGITS)


def test_kl_of_small_differences_is_not_drowned_by_rounding() -> None:
    draws = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5000, generator=draws)
    b = a + 1e-5 * torch.randn(5, 5000, generator=draws)
    exact = torch.nn.functional.kl_div(b.double().log_softmax(-1), a.double().log_softmax(-1), log_target=True, reduction="none").sum(-1)
    got = kl_divergence(a.log_softmax(-1), b.log_softmax(-1))
    naive = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    assert exact.max() < 1e-10
    assert torch.allclose(got.double(), exact, rtol=0.05, atol=0)
    assert (naive.double() - exact).abs().max() > 10 * (got.double() - exact).abs().max()
    assert torch.equal(kl_divergence(a.log_softmax(-1), a.log_softmax(-1)), torch.zeros(5))


def test_kl_with_tokens_that_are_ruled_out() -> None:
    inf = float("inf")
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5], [0.5, 0.5, 0.0]]).log()
    hand = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.5 * math.log(2) * 2, inf]
    assert kl_divergence(p, q).tolist() == pytest.approx(hand)
