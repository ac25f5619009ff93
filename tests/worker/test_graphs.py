"""Recorded decode steps with a device that only remembers what to run: on a GPU nothing but CUDA is added."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.messages import UNKNOWN_TOKEN, PlanRow, SamplingParams, StepPlan
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.weights import load_weights
from ernie_serve.worker import runner as runner_file
from ernie_serve.worker.graphs import CudaDevice, DecodeGraphs, is_plain
from ernie_serve.worker.runner import Runner
from ernie_serve.worker.sampler import _pick


class FakeDevice:
    """Records by remembering, and reads late: what is overwritten before it is read would show."""

    def __init__(self):
        self.num_recorded = 0
        self.num_replayed = 0

    def buffer(self, num_bytes):
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def record(self, run):
        run()
        self.num_recorded += 1

        def replay():
            self.num_replayed += 1
            run()

        return replay

    def read(self, tensor):
        copy = tensor.clone()
        return copy.tolist


class ForgetfulDevice(FakeDevice):
    """Keeps of a recording what a graph keeps: the addresses of what it reads, and not the tensors."""

    def record(self, run):
        self.read_by_address = seen = Seen()
        with seen:
            run()
        return lambda: None


class Seen(TorchDispatchMode):
    """Memory that operations are given and that none of them has made."""

    def __init__(self):
        super().__init__()
        self.made, self.given = set(), {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self.made:
                self.given.setdefault(each.untyped_storage()._cdata, StorageWeakRef(each.untyped_storage()))
        out = operation(*args, **(kwargs or {}))
        self.made |= {each.untyped_storage()._cdata for each in tree_leaves(out) if isinstance(each, torch.Tensor)}
        return out


class PaddedKernels(ReferenceKernels):
    """The reference with what a recorded step asks beyond it; it reads tensors only, as a graph does."""

    def __init__(self):
        self.num_live = None
        self.routed = []

    @contextmanager
    def padded(self, num_live):
        self.num_live = num_live
        yield
        self.num_live = None

    def route(self, x, weight, bias, top_k, norm_min):
        weights, ids = super().route(x, weight, bias, top_k, norm_min)
        if self.num_live is not None:
            ids = ids.masked_fill((torch.arange(len(ids)) >= self.num_live)[:, None], -1)
        self.routed.append(ids)
        return weights, ids

    def rope_and_write(self, qkv, rotary, k_cache, v_cache, slots, num_heads):
        real = slots >= 0
        q = super().rope_and_write(
            qkv, rotary, k_cache[:1].clone(), v_cache[:1].clone(), torch.zeros_like(slots), num_heads
        )
        if real.any():
            super().rope_and_write(qkv[real], rotary[real], k_cache, v_cache, slots[real], num_heads)
        return q

    def attention(self, q, k_cache, v_cache, layout):
        if self.num_live is None:
            return super().attention(q, k_cache, v_cache, layout)
        T, H, D = q.shape
        out = torch.zeros(T, H, D)
        for r, length in enumerate(layout.context_lens.tolist()):
            if length:
                keys, values = (self._gather(c, layout.block_tables[r], length) for c in (k_cache, v_cache))
                heads = q[r].view(keys.shape[1], -1, D)
                shares = (torch.einsum("kgd,lkd->kgl", heads, keys) * D**-0.5).softmax(-1)
                out[r] = torch.einsum("kgl,lkd->kgd", shares, values).reshape(H, D)
        return out.view(T, H * D)

    def sample(self, logits, settings, top_ks, num_valid_ids):
        logits, ids = logits[:, :num_valid_ids].float(), []
        for row, (point, temperature, top_p, min_p), top_k in zip(
            logits, settings.tolist(), top_ks.tolist(), strict=True
        ):
            if temperature == 0:
                ids.append(row.argmax())
            else:
                p = SamplingParams(max_tokens=1, seed=0, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
                ids.append(_pick(row[None], [p], [point])[0])
        return torch.stack(ids)


@pytest.fixture(scope="module")
def model(make_checkpoint):
    folder = make_checkpoint("21b-like")
    model = Ernie(ModelConfig.from_folder(folder), PaddedKernels(), torch.float32)
    load_weights(model, folder)
    return model


def row(name, known, num_prompt, blocks, unknown=False, **sampling):
    """The decode of a text whose tokens are known, or known but for the last."""
    sampling = {"max_tokens": 99, "seed": 5, "temperature": 0.0} | sampling
    return PlanRow(
        request_id=name,
        token_ids=[UNKNOWN_TOKEN if unknown else known[-1]],
        start=len(known) - 1,
        block_ids=blocks,
        sampling=SamplingParams(**sampling),
        wants_token=True,
        prompt_token_ids=known[:num_prompt],
        output_token_ids=known[num_prompt:-1] if unknown else known[num_prompt:],
    )


def prefilled(runner, name, prompt, blocks, **sampling):
    """A text whose prompt but for the last token is in the cache."""
    plain = row(name, prompt, len(prompt), blocks, **sampling)
    sampled = runner.execute(
        StepPlan(0, [PlanRow(
            request_id=name, token_ids=prompt[:-1], start=0, block_ids=blocks, sampling=plain.sampling,
            wants_token=False, prompt_token_ids=prompt, output_token_ids=[],
        )])
    )  # fmt: skip
    assert not sampled


TEXTS = {"a": [5, 9, 300, 7], "b": [1, 2, 3, 4, 5, 6], "c": [44, 13]}
BLOCKS = {"a": [3, 1, 8], "b": [2, 7, 6], "c": [5, 4, 0]}
SAMPLING = {"a": {}, "b": {"temperature": 1.0, "seed": 8}, "c": {"temperature": 0.8, "top_p": 0.9, "top_k": 40}}


def make_runner(model, device=None):
    runner = Runner(model, 9, 4, max_num_seqs=4, num_valid_ids=600, device=device, max_model_len=12)
    for name, prompt in TEXTS.items():
        prefilled(runner, name, prompt, BLOCKS[name], **SAMPLING[name])
    return runner


def decoded(runner, num_steps):
    """All three texts, step by step through `execute`."""
    texts = {name: list(prompt) for name, prompt in TEXTS.items()}
    for step in range(num_steps):
        plan = StepPlan(step, [row(n, t, len(TEXTS[n]), BLOCKS[n], **SAMPLING[n]) for n, t in texts.items()])
        for each in runner.execute(plan):
            texts[each.request_id].append(each.token_id)
    return texts


def test_a_recorded_step_makes_the_tokens_of_an_executed_one(model):
    device = FakeDevice()
    runner, texts = make_runner(model, device), {name: list(prompt) for name, prompt in TEXTS.items()}
    for step in range(3):
        plan = StepPlan(step, [row(n, t, len(TEXTS[n]), BLOCKS[n], **SAMPLING[n]) for n, t in texts.items()])
        for each in runner.collect(runner.launch(plan)):
            texts[each.request_id].append(each.token_id)
    assert texts == decoded(make_runner(model), 3)
    assert (device.num_recorded, device.num_replayed) == (1, 3), "one size, one recording"


def test_a_step_takes_tokens_that_are_still_under_way_from_the_one_before(model):
    """Each step is launched before the one before is collected, with its rows in another order and one gone."""
    runner = make_runner(model, FakeDevice())
    want = decoded(make_runner(model), 3)
    known = {name: len(prompt) for name, prompt in TEXTS.items()}
    order = [["a", "b", "c"], ["c", "a", "b"], ["b", "c"]]
    flights = []
    for step, names in enumerate(order):
        rows = [row(n, want[n][: known[n] + step], known[n], BLOCKS[n], unknown=step > 0, **SAMPLING[n]) for n in names]
        flights.append(runner.launch(StepPlan(step, rows)))
    for step, (names, flight) in enumerate(zip(order, flights, strict=True)):
        tokens = {s.request_id: s.token_id for s in runner.collect(flight)}
        assert tokens == {n: want[n][known[n] + step] for n in names}


def test_padded_rows_write_nothing_and_route_nowhere(model):
    runner = make_runner(model, FakeDevice())
    before = [tensor.clone() for pair in runner.cache for tensor in pair]
    model.kernels.routed.clear()
    runner.graphs.record_all(12)
    assert all((ids == -1).all() for ids in model.kernels.routed), "while recording no row is real"
    assert all(torch.equal(*both) for both in zip(before, (t for pair in runner.cache for t in pair), strict=True))
    model.kernels.routed.clear()
    runner.launch(StepPlan(1, [row(n, TEXTS[n], len(TEXTS[n]), BLOCKS[n]) for n in TEXTS]))
    assert all((ids >= 0).all(-1).tolist() == [True, True, True, False] for ids in model.kernels.routed)


def test_all_that_a_graph_reads_lives_as_long_as_it(model):
    device = ForgetfulDevice()
    runner = Runner(model, 9, 4, max_num_seqs=4, device=device, max_model_len=12)
    runner.graphs.record_all(12)
    gc.collect()
    given = device.read_by_address.given
    assert len(given) > 20, "weights, the cache and the inputs at least"
    assert not [memory for memory in given.values() if memory.expired()]


class FakeCuda:
    """Of torch.cuda what a recording asks for: streams, which are numbered, and graphs."""

    def __init__(self):
        self.num_streams = 0
        self.captured = []
        self.done = []

    def Stream(self):
        self.num_streams += 1
        return SimpleNamespace(number=self.num_streams, wait_stream=lambda other: None)

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.done.append("waited"))

    def synchronize(self):
        self.done.append("synchronized")

    @contextmanager
    def stream(self, stream):
        yield

    def CUDAGraph(self):
        return SimpleNamespace(pool=lambda: (0, 1), replay=lambda: None)

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.captured.append((pool, stream and stream.number))
        yield


def test_all_graphs_are_warmed_and_captured_on_one_stream_and_share_one_pool(monkeypatch):
    """A stream that libraries have worked on keeps their workspaces: 32 streams would keep a GiB on an H200."""
    cuda, ran = FakeCuda(), []
    monkeypatch.setattr(torch, "cuda", cuda)
    device = CudaDevice()
    for _ in range(3):
        device.record(lambda: ran.append(len(cuda.captured)))
    assert cuda.num_streams == 1
    assert cuda.captured == [(None, 1), ((0, 1), 1), ((0, 1), 1)]
    assert ran == [0, 0, 1, 1, 1, 2, 2, 2, 3], "twice before each capture, and once in it"
    assert cuda.done == ["waited", "synchronized"] * 3


def test_all_sizes_are_recorded_once_the_largest_first(model):
    device = FakeDevice()
    runner = make_runner(model, device)
    runner.graphs.record_all(12)
    assert [bucket for bucket, _ in runner.graphs._replays] == [4, 2, 1]
    runner.launch(StepPlan(1, [row("a", TEXTS["a"], 4, BLOCKS["a"])]))
    assert (device.num_recorded, device.num_replayed) == (3, 1)


def test_every_step_runs_on_the_models_own_device_whichever_is_the_threads(model, monkeypatch):
    inside, seen = [], []

    @contextmanager
    def current(device):
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(runner_file, "current", current)
    embedding = model.kernels.embedding
    monkeypatch.setattr(model.kernels, "embedding", lambda *args: seen.append(list(inside)) or embedding(*args))
    runner = make_runner(model, FakeDevice())
    runner.launch(StepPlan(1, [row("a", TEXTS["a"], 4, BLOCKS["a"])]))
    assert len(seen) > len(TEXTS)
    assert all(each == [torch.device("cpu")] for each in seen)


@pytest.mark.parametrize(
    "sampling",
    [
        {"logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"allowed_token_ids": (1, 2)},
        {"min_tokens": 3, "stop_token_ids": (2,)},
    ],
)
def test_what_needs_the_host_is_not_launched(model, sampling):
    runner = make_runner(model, FakeDevice())
    assert is_plain(row("a", TEXTS["a"], 4, BLOCKS["a"]))
    assert runner.launch(StepPlan(1, [row("a", TEXTS["a"], 4, BLOCKS["a"], **sampling)])) is None
    assert make_runner(model).launch(StepPlan(1, [row("a", TEXTS["a"], 4, BLOCKS["a"])])) is None, "nothing records"


def test_prompts_are_not_launched(model):
    runner = make_runner(model, FakeDevice())
    plan = row("a", TEXTS["a"], 4, BLOCKS["a"])
    prompt = PlanRow(
        request_id="a", token_ids=TEXTS["a"], start=0, block_ids=BLOCKS["a"], sampling=plan.sampling,
        wants_token=True, prompt_token_ids=TEXTS["a"], output_token_ids=[],
    )  # fmt: skip
    assert runner.launch(StepPlan(1, [prompt])) is None
    assert isinstance(runner.graphs, DecodeGraphs)
