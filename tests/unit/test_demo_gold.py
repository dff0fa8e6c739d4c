"""The demo's questions do not leak between splits, and its simulated judge can't be pleased by cheap text."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from importlib import resources

import pytest

from tether.methods.demo.gold import KIND_WORDS, GoldJudge, GoldScore, echo_share, repeated_share, word_set, words_of

JUDGE = GoldJudge()
QUESTION = "How do I boil an egg?"
GOOD = "Put the egg in boiling water for eight minutes, then cool it in cold water. Enjoy your egg!"
# The median of 540 samples of the start model (temperature 0.5, at most 48 tokens): cheap text must stay below it.
MEDIAN = -0.3


def score(answer: str, *, question: str = QUESTION, finished: bool = True, own=-1.0, pmi=0.7, n=20) -> GoldScore:
    """Score with made-up log-probs per token: normal speech that belongs to the question, unless told otherwise."""
    return JUDGE.score(
        question=question,
        answer=answer,
        finished=finished,
        logprob_given_question=own * n,
        logprob_given_generic=(own - pmi) * n,
        tokens=n,
    )


def rows() -> list[dict[str, str]]:
    text = resources.files("tether.methods.demo").joinpath("questions.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


STOP = word_set(
    "a an the i my me is are do does did what how why when who can should to for of in on at with and or be you your "
    "we our in that this about from by up out get make keep write suggest name tell say describe give good short one "
    "two simple small new will not has have some any more most best without word help start use take message friend "
    "well mean sentence note day now time"
)


def content(prompt: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", prompt.lower())) - STOP


def test_questions_have_the_promised_shape():
    found = rows()
    assert all(set(r) == {"id", "split", "prompt"} for r in found)
    assert len({r["id"] for r in found}) == len(found)
    assert sum(r["split"] == "train" for r in found) >= 260
    assert sum(r["split"] == "heldout" for r in found) >= 64
    assert {r["split"] for r in found} == {"train", "heldout"}
    assert max(len(r["prompt"].split()) for r in found) <= 16


def test_no_question_of_one_split_resembles_one_of_the_other():
    normal = [re.sub(r"\W+", " ", r["prompt"].lower()).strip() for r in rows()]
    assert len(set(normal)) == len(normal)
    train = [content(r["prompt"]) for r in rows() if r["split"] == "train"]
    heldout = [content(r["prompt"]) for r in rows() if r["split"] == "heldout"]
    for h in heldout:
        for t in train:
            assert len(h & t) / max(1, len(h | t)) < 0.4, (h, t)


def test_total_is_the_sum_and_a_good_answer_gets_every_bonus_and_no_deduction():
    got = score(GOOD)
    words = len(GOOD.split())
    by_hand = 2.5 + 1.0 + 1.0 - math.log2(words / 20) ** 2
    assert got.total == pytest.approx(by_hand)
    assert got.total == pytest.approx(got.style + got.fluency + got.relevance)
    assert got.style == pytest.approx(sum(got.parts.values()))


CHEAP = {
    "gibberish": dict(answer="You warm glad egg lantern of blick mountain happy under the friend table.", own=-8.0),
    "repeated word": dict(answer="Great! " * 20, own=-1.0),
    "repeated phrase": dict(answer="You are so kind, and you are so kind, and you are so kind, and you are so kind."),
    "friendly non-answer": dict(answer="Sure! I'm happy to help. Have a great day!", own=-2.5, pmi=-0.5),
    "question echoed": dict(answer=QUESTION, own=-1.2),
    "echo as a statement": dict(answer="You boil an egg.", own=-1.2),
    "task handed back": dict(answer="I'd be happy to help you boil an egg. What kind of egg would you like to boil?"),
    "answer to another question": dict(answer="Breathe slowly and enjoy the calm you feel, my friend.", own=-3, pmi=-1),
    "cut in the middle": dict(answer="Put the egg in boiling water and then you will have to wait for", finished=False),
    "nothing": dict(answer="", n=1, own=-5.0, pmi=-1.0),
}


@pytest.mark.parametrize("name", [n for n in CHEAP if n != "cut in the middle"])
def test_cheap_text_scores_below_the_median_honest_sample(name):
    assert score(**CHEAP[name]).total < MEDIAN - 0.5


def test_an_answer_that_is_cut_loses_the_ending_and_nothing_else():
    whole, cut = score(GOOD), score(GOOD, finished=False)
    assert whole.total - cut.total == pytest.approx(JUDGE.ending_bonus)
    assert score(**CHEAP["cut in the middle"]).total < score(GOOD).total - JUDGE.ending_bonus


@pytest.mark.parametrize("tail", ["", ",", " and", ":"])
def test_stopping_without_a_full_stop_earns_no_ending(tail):
    assert score(GOOD[:-1] + tail).parts["ending"] == 0.0
    assert score(GOOD[:-1] + ".").parts["ending"] == JUDGE.ending_bonus
    assert score(f'"{GOOD}"').parts["ending"] == JUDGE.ending_bonus


def test_more_markers_of_the_same_kind_gain_nothing():
    base = score(GOOD)
    more = score(GOOD[:-1] + "!!! Enjoy, dear friend, your wonderful you!")
    for part in ("ending", "reader", "kind"):
        assert more.parts[part] == base.parts[part]
    assert more.total <= base.total


def test_kind_words_lent_from_the_question_do_not_count():
    question = "Write a thank you to my dear friend."
    assert score("Thank my dear friend for the visit.", question=question).parts["kind"] == 0.0
    assert score("Thank my lovely friend for the visit.", question=question).parts["kind"] == JUDGE.kind_bonus


def test_kind_words_are_single_words_as_the_judge_splits_them():
    assert all(words_of(w) == [w] for w in KIND_WORDS)


def test_brevity_is_best_in_the_middle_smooth_and_bounded():
    def brevity(n: int) -> float:
        return score(" ".join(f"w{'x' * i}" for i in range(n))).parts["brevity"]

    assert brevity(20) == 0.0
    assert brevity(10) == pytest.approx(-1.0) == brevity(40)
    assert brevity(1) == -JUDGE.brevity_floor
    steps = [brevity(n + 1) - brevity(n) for n in range(8, 60)]
    assert max(abs(s) for s in steps) < 0.5


def test_fluency_has_no_bonus_and_falls_steeply():
    assert score(GOOD, own=-0.1).fluency == 0.0 == score(GOOD, own=JUDGE.fluency_floor).fluency
    assert score(GOOD, own=JUDGE.fluency_floor - 2).fluency == pytest.approx(-2 * JUDGE.fluency_weight)


def test_fluency_and_relevance_are_per_token():
    assert score(GOOD, own=-2.0, pmi=0.1, n=5).total == pytest.approx(score(GOOD, own=-2.0, pmi=0.1, n=50).total)


def test_relevance_is_hinged_on_both_sides():
    full, weight = JUDGE.relevance_full, JUDGE.relevance_weight
    assert score(GOOD, pmi=5.0).relevance == 0.0 == pytest.approx(score(GOOD, pmi=full).relevance)
    assert score(GOOD, pmi=0.0).relevance == pytest.approx(-weight)
    assert score(GOOD, pmi=-9.0).relevance == pytest.approx(-2 * weight)
    assert score(GOOD, pmi=full / 2).relevance == pytest.approx(-weight / 2)


@pytest.mark.parametrize(
    "text",
    [
        "1. Boil it.\n2. Eat it.",
        "**Boil** it.",
        "Dear [Name], boil it.",
        "- Boil it.",
        "煮鸡蛋 it.",
        "See https://a.b.",
    ],
)
def test_lists_placeholders_and_foreign_script_cost(text):
    assert score(text).parts["markup"] == -JUDGE.markup_penalty


@pytest.mark.parametrize("text", [GOOD, "A café – well, “yours” – is 20° warm…", "Wait 8.5 minutes (or 9), it's fine."])
def test_plain_prose_has_no_markup(text):
    assert score(text).parts["markup"] == 0.0


def test_shares_by_hand():
    assert repeated_share(["a", "b", "a", "b"]) == pytest.approx(1 / 3)
    assert repeated_share(["a"]) == 0.0
    assert echo_share(["the", "egg", "is", "hot"], {"egg"}) == 0.5
    assert echo_share(["the", "a"], set()) == 1.0
    assert words_of("It’s 20 warm, THANK-you!") == ["it's", "20", "warm", "thank", "you"]


def test_preferences_follow_bradley_terry():
    assert JUDGE.preference_probability(1.0, 1.0) == 0.5
    assert JUDGE.preference_probability(JUDGE.temperature, 0.0) == pytest.approx(1 / (1 + math.exp(-1)))
    assert JUDGE.preference_probability(2.0, 0.3) + JUDGE.preference_probability(0.3, 2.0) == pytest.approx(1.0)
    assert JUDGE.preference_probability(1e6, -1e6) == 1.0
    assert JUDGE.preference_probability(-1e6, 1e6) == 0.0


def test_draws_have_the_stated_frequency_and_follow_the_seed():
    p = JUDGE.preference_probability(0.3, 0.0)
    generator = random.Random(0)
    rankings = [JUDGE.rank([0.3, -0.5, 0.0], generator) for _ in range(4000)]
    share = sum(r.index(0) < r.index(2) for r in rankings) / 4000
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    again = random.Random(0)
    assert rankings == [JUDGE.rank([0.3, -0.5, 0.0], again) for _ in range(4000)]


@pytest.mark.parametrize("bad", [dict(n=0), dict(own=float("nan")), dict(own=float("-inf"))])
def test_impossible_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=r"tokens|finite"):
        score(GOOD, **bad)


def test_the_judge_is_disclosed_and_frozen():
    text = JUDGE.describe()
    assert "simulated" in text and "no person" in text and "Bradley-Terry" in text and "knows no facts" in text
    for part in ("Style", "Fluency", "Relevance"):
        assert part in text
    assert f"+{GoldJudge(kind_bonus=0.25).kind_bonus:g}" in GoldJudge(kind_bonus=0.25).describe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        JUDGE.temperature = 1.0  # type: ignore[misc]
