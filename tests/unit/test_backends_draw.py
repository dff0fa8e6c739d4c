"""Drawing a token: cuts of the distribution, frequencies, edges, and where the random numbers come from."""

import pytest
import torch

from draw_cases import nucleus
from tether.backends.local.draw import draw, scores, uniforms
from tether.core.protocols import SamplingSettings


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.6, 0), (1.0, 3), (0.7, 4), (0.01, 0), (1.0, 99), (0.9, 1)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_after_the_cuts(temperature: float, top_p: float, top_k: int):
    logits = 2 * torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k)
    ours = scores(logits, settings).softmax(dim=-1)
    for row, logit in zip(ours, logits.double(), strict=True):
        right = nucleus((logit / temperature).softmax(-1).tolist(), top_p, top_k)
        torch.testing.assert_close(row, torch.tensor(right), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8}, {"top_k": 3}], ids=["whole", "top_p", "top_k"])
def test_frequencies(cut: dict):
    """Pearson's χ² of 20000 draws under its 99.9 % quantile, and nothing drawn that was cut."""
    kept = scores(torch.tensor([[1.0, 0.3, -0.5, 2.0, 0.0, -1.0]]), SamplingSettings(**cut))
    logprobs = kept.log_softmax(dim=-1)
    count = 20_000
    u = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens, of_tokens = draw(kept.expand(count, -1), u)
    torch.testing.assert_close(of_tokens, logprobs[0, tokens])
    seen = torch.bincount(tokens, minlength=6).double()
    expected = logprobs[0].double().exp() * count
    assert not seen[expected == 0].any()
    possible = expected > 0
    statistic = ((seen - expected) ** 2 / expected)[possible].sum()
    assert float(statistic) < {6: 20.5, 4: 16.3, 3: 13.8}[int(possible.sum())]


def test_the_edges_of_a_draw():
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log()
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1.0])
    assert draw(logprobs.expand(5, -1), u)[0].tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_a_draw_from_a_large_vocabulary_is_that_of_one_cumulative_sum(size: int):
    """Blocks of the vocabulary change nothing; u stays away from the edges, where rounding decides."""
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(200, size, generator=generator)
    probs = logits.double().softmax(dim=-1)
    tokens = torch.randint(size, (200,), generator=generator)
    middle = (probs.cumsum(dim=-1) - probs / 2).gather(1, tokens[:, None]).squeeze(1)
    wide = probs.gather(1, tokens[:, None]).squeeze(1) > 1e-4
    drawn, logprobs = draw(logits, middle.float())
    assert torch.equal(drawn[wide], tokens[wide]) and wide.any()
    right = probs.log().gather(1, tokens[:, None]).squeeze(1)[wide]
    torch.testing.assert_close(logprobs[wide].double(), right, atol=1e-5, rtol=1e-5)


def test_uniforms_are_a_function_of_seed_prompt_and_index():
    base = uniforms(1, "p", 0, 50)
    assert torch.equal(base, uniforms(1, "p", 0, 50)) and torch.equal(base[:9], uniforms(1, "p", 0, 9))
    for other in (
        uniforms(2, "p", 0, 50),
        uniforms(1, "q", 0, 50),
        uniforms(1, "p", 1, 50),
        uniforms(1, "p\x000", 0, 50),
    ):
        assert not torch.equal(base, other)
    assert float(base.min()) >= 0 and float(base.max()) < 1 and 0.3 < float(base.mean()) < 0.7
