"""Which experts a token gets hangs on how scores are rounded: choices are those of a router that rounds as published."""

import pytest
import torch
from comfyui_hywu.hywu_core.backbone.layer import Router
from torch.nn import functional as F

TOKENS, WIDTH, EXPERTS, TOP_K = 20_000, 96, 64, 8


@pytest.fixture(scope="module")
def given():
    noise = torch.Generator().manual_seed(0)
    router = Router(WIDTH, EXPERTS, TOP_K)
    router.wg.weight.copy_(torch.randn(EXPERTS, WIDTH, generator=noise) * WIDTH**-0.5)
    return router, torch.randn(TOKENS, WIDTH, generator=noise).bfloat16()


def slowly(score_TE):
    """Softmax over all in fp32, the largest, divided by their sum (spec section 2); equal scores: the first ones."""
    share_TE = score_TE.float().softmax(dim=-1)
    share_TK, expert_TK = share_TE.sort(dim=-1, descending=True, stable=True)
    share_TK = share_TK[:, :TOP_K]
    return expert_TK[:, :TOP_K], share_TK / share_TK.sum(-1, keepdim=True)


def sets(expert_TK):
    return torch.zeros(len(expert_TK), EXPERTS, dtype=torch.bool).scatter_(1, expert_TK, True)


@torch.no_grad()
def test_choices_are_those_of_a_router_that_rounds_its_scores_to_bf16(given):
    router, x_TD = given
    score_TE = F.linear(x_TD, router.wg.weight.bfloat16())
    assert score_TE.dtype == torch.bfloat16
    expert_TK, share_TK = router(x_TD)
    wanted_TK, wanted_share_TK = slowly(score_TE)
    last = score_TE.float().sort(dim=-1, descending=True).values
    clear = last[:, TOP_K - 1] > last[:, TOP_K]
    # Where the eighth and the ninth score are equal either may be taken; elsewhere there is one answer.
    assert 0.3 < clear.float().mean() < 1
    assert torch.equal(sets(expert_TK)[clear], sets(wanted_TK)[clear])
    taken = score_TE.float().gather(1, expert_TK).sort(dim=-1).values
    assert torch.equal(taken, score_TE.float().gather(1, wanted_TK).sort(dim=-1).values)
    torch.testing.assert_close(share_TK.sort(dim=-1).values, wanted_share_TK.sort(dim=-1).values)


@torch.no_grad()
def test_scores_that_are_not_rounded_choose_others(given):
    """Or the test above would show nothing."""
    router, x_TD = given
    plain_TK, _ = slowly(x_TD.float() @ router.wg.weight.T)
    assert (sets(router(x_TD)[0]) != sets(plain_TK)).any(1).float().mean() > 0.01


@torch.no_grad()
def test_in_fp32_nothing_is_rounded(given):
    router, x_TD = given
    expert_TK, share_TK = router(x_TD.float())
    wanted_TK, wanted_share_TK = slowly(F.linear(x_TD.float(), router.wg.weight))
    assert torch.equal(sets(expert_TK), sets(wanted_TK))
    torch.testing.assert_close(share_TK, wanted_share_TK)
