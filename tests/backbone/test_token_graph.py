"""One token as a graph: replayed at fixed addresses, given up when these change, and without a graph where there is none."""

import logging
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from comfyui_hywu.hywu_core.backbone import token_graph
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.backbone.rope import positions, table
from comfyui_hywu.hywu_core.lora.routing import recording
from comfyui_hywu.kernels.reference import Adapter

from .recorder import captures  # noqa: F401

LENGTH, PROMPT = 12, 5


@pytest.fixture
def backbone(tiny_model, monkeypatch):
    """The tiny model on one stage whose graphs are new."""
    (stage,) = tiny_model.backbone.stages
    monkeypatch.setattr(stage, "graphs", token_graph.TokenGraphs(stage.layers))
    monkeypatch.setattr(stage, "resident", True)
    return tiny_model.backbone


def thought(backbone, capacity=LENGTH, between=lambda index: None, mode=lambda index: nullcontext()):
    """A prompt and then token by token against a cache: the hidden states of all, and those of one full pass."""
    hidden = torch.randn(1, LENGTH, backbone.config.hidden_size, generator=torch.Generator().manual_seed(1))
    cos, sin = table(positions(LENGTH, []), backbone.config.attention_head_dim, backbone.config.rope_theta)
    full = backbone.run(hidden, (cos, sin), attention_mask(LENGTH, []))
    caches = backbone.new_cache(1, capacity)
    parts = [backbone.run(hidden[:, :PROMPT], (cos[:PROMPT], sin[:PROMPT]), attention_mask(PROMPT, []), caches)]
    for index in range(PROMPT, LENGTH):
        between(index)
        at = slice(index, index + 1)
        with mode(index):
            parts.append(backbone.run(hidden[:, at], (cos[at], sin[at]), None, caches, torch.tensor([index])))
    return torch.cat(parts, dim=1), full


@torch.no_grad()
def test_tokens_of_one_graph_equal_the_full_pass(backbone, captures):  # noqa: F811
    seen = []
    got, full = thought(backbone)
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert len(captures) == 1
    hidden = torch.zeros(1, 1, backbone.config.hidden_size)
    rope = table(positions(1, []), backbone.config.attention_head_dim, backbone.config.rope_theta)
    backbone.run(hidden, rope, None, backbone.new_cache(1, 4), torch.tensor([0]), seen.append)
    assert seen == [0, 1] and len(captures) == 2  # another cache, another graph


@torch.no_grad()
def test_a_result_is_not_overwritten_by_the_next_token(backbone, captures):  # noqa: F811
    rope = table(positions(1, []), backbone.config.attention_head_dim, backbone.config.rope_theta)
    caches, noise = backbone.new_cache(1, 8), torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, 1, backbone.config.hidden_size, generator=noise) for _ in range(4)]
    results = [backbone.run(token, rope, None, caches, torch.tensor([place])) for place, token in enumerate(tokens)]
    kept = [result.clone() for result in results]
    backbone.run(tokens[0], rope, None, caches, torch.tensor([4]))
    assert all(map(torch.equal, results, kept)) and len(captures) == 1


@torch.no_grad()
def test_a_cache_that_grows_gets_a_new_graph(backbone, captures):  # noqa: F811
    got, full = thought(backbone, capacity=PROMPT + 2)
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert len(captures) == 2


@torch.no_grad()
def test_weights_that_move_get_a_new_graph(backbone, captures):  # noqa: F811
    projection = backbone.model.layers[1].self_attn.o_proj
    before = projection.weight

    def move(index):
        if index == PROMPT + 3:
            projection.weight = torch.nn.Parameter(before.clone(), requires_grad=False)
            before_values.copy_(before)
            before.fill_(float("nan"))

    before_values = before.clone()
    try:
        got, full = thought(backbone, between=move)
    finally:
        before.copy_(before_values)
        projection.weight = before
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert len(captures) == 2


@torch.no_grad()
def test_tokens_under_a_lora_and_of_stages_that_stream_are_no_graph(backbone, captures):  # noqa: F811
    projection = backbone.model.layers[1].self_attn.o_proj
    projection.attach("", Adapter(torch.randn(3, projection.weight.shape[1]), torch.randn(projection.weight.shape[0], 3), None))
    try:
        got, full = thought(backbone)
    finally:
        projection.attach("", None)
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(full, thought(backbone)[1]) and len(captures) == 1
    backbone.stages[0].resident = False
    thought(backbone)
    assert len(captures) == 1


@torch.no_grad()
def test_experts_are_counted_in_replays(backbone, captures):  # noqa: F811
    with recording(backbone) as routing:
        thought(backbone)
    assert captures and routing.counts().sum(-1).tolist() == [2 * LENGTH * backbone.config.moe_topk[0]] * 2


@torch.no_grad()
def test_autograd_has_no_graph(backbone, captures):  # noqa: F811
    with torch.enable_grad():
        got, full = thought(backbone)
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert not captures


@pytest.mark.parametrize("first", (0, 1))
@torch.no_grad()
def test_inference_mode_may_change_between_tokens(backbone, captures, first):  # noqa: F811
    got, full = thought(backbone, mode=lambda index: torch.inference_mode((index + first) % 2 == 0))
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert len(captures) == 1


@torch.no_grad()
def test_what_waits_for_the_device_is_no_graph_and_says_so_once(backbone, captures, monkeypatch, caplog):  # noqa: F811
    layer = backbone.model.layers[0]
    forward = layer.mlp.gate.forward

    def waits(x):
        chosen, share = forward(x)
        chosen.sum().item()
        return chosen, share

    monkeypatch.setattr(layer.mlp.gate, "forward", waits)
    with caplog.at_level(logging.WARNING, "hywu"):
        got, full = thought(backbone)
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert len(captures) == 1
    assert [record.message for record in caplog.records] == [
        "HY-WU: no CUDA graph of a token on cpu (operation not permitted when stream is capturing): thinking is slower"]


@torch.no_grad()
def test_a_graph_with_another_result_is_not_used(backbone, captures, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(token_graph, "recorded", lambda work, device: (work() * 1.1, lambda: None))
    with caplog.at_level(logging.WARNING, "hywu"):
        got, full = thought(backbone)
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-5)
    assert "its result is 10.0% off" in caplog.text and len(caplog.records) == 1


@torch.no_grad()
def test_a_graph_that_does_not_fit_into_memory_is_done_without(backbone, captures, monkeypatch, caplog):  # noqa: F811
    def full(work, device):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(token_graph, "recorded", full)
    with caplog.at_level(logging.WARNING, "hywu"):
        got, full_pass = thought(backbone)
    torch.testing.assert_close(got, full_pass, rtol=1e-5, atol=1e-5)
    assert "(none left)" in caplog.text and len(caplog.records) == 1


@torch.no_grad()
def test_a_cache_that_grows_keeps_no_old_buffers_for_its_graph(backbone, captures):  # noqa: F811
    (cache,), rope = backbone.new_cache(1, 4), table(positions(1, []), backbone.config.attention_head_dim, 1e4)
    token = torch.zeros(1, 1, backbone.config.hidden_size)
    backbone.run(token, rope, None, [cache], torch.tensor([0]))
    # The stand-in for a graph keeps all that it saw: this one does not.
    backbone.stages[0].graphs._graphs[cache]._replay = None
    old = weakref.ref(cache._keys[0])
    whole = cache.whole()
    assert cache.shares(whole) and old() is not None
    cache.reserve(5)
    assert old() is None and not cache.shares(whole) and len(captures) == 1


class Cuda:
    """Stand-ins for the parts of torch.cuda that a capture needs; ``events`` has what was done on which stream."""

    def __init__(self, monkeypatch, fails=False):
        self.events, self.stream, cuda = [], "current", torch.cuda

        class Graph:
            def capture_begin(graph, pool, capture_error_mode):
                self.events.append(f"begin on {self.stream}")

            def capture_end(graph):
                self.events.append("end")
                if fails:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(graph):
                self.events.append("replay")

        @contextmanager
        def on(stream):
            before, self.stream = self.stream, stream
            try:
                yield
            finally:
                self.stream = before

        for name, value in {
            "CUDAGraph": Graph, "device": lambda device: nullcontext(), "stream": on, "synchronize": lambda device: None,
            "current_stream": lambda device: "current", "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: None,
        }.items():
            monkeypatch.setattr(cuda, name, value)
        self.side = SimpleNamespace(wait_stream=lambda other: self.events.append(f"wait for {other}"))
        monkeypatch.setattr(token_graph, "_lane", lambda device: ((0, 1), self.side))

    def work(self):
        self.events.append("work on the side" if self.stream is self.side else "work")
        return torch.ones(1)


def test_a_capture_is_tried_first_and_made_on_a_stream_of_its_own(monkeypatch):
    cuda = Cuda(monkeypatch)
    result, replay = token_graph.recorded(cuda.work, torch.device("cuda", 0))
    replay()
    assert result.equal(torch.ones(1)) and cuda.stream == "current"
    assert [event.partition(" on namespace")[0] for event in cuda.events] == [
        "wait for current", "work on the side", "begin", "work on the side", "end", "replay"]


def test_a_capture_that_fails_leaves_the_current_stream(monkeypatch):
    cuda = Cuda(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="during capture"):
        token_graph.recorded(cuda.work, torch.device("cuda", 0))
    assert cuda.stream == "current" and cuda.events[-1] == "end"


def test_what_waits_is_never_captured(monkeypatch):
    cuda = Cuda(monkeypatch)

    def waits():
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        return cuda.work()

    with pytest.raises(RuntimeError, match="waits for the GPU"):
        token_graph.recorded(waits, torch.device("cuda", 0))
    assert cuda.stream == "current" and not any("begin" in event for event in cuda.events)
