"""The bundled model's whole context is real: at its end, the engine and transformers say the same next token."""

import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.config import Settings
from ernie_serve.engine_process import build_engine
from ernie_serve.messages import EngineRequest, SamplingParams
from ernie_serve.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from tiny import talk, words  # scripts are no package of ours

CONTEXT = 8192
LENGTH = 8100


def test_a_prompt_of_nearly_the_whole_context_agrees_with_transformers():
    tokenizer = Tokenizer.from_folder(ERNIE_TINY)
    drawn = words.Words(random.Random(8))
    prompt: list[int] = []
    while len(prompt) < LENGTH:
        prompt += tokenizer.encode(talk.plain(drawn) + "\n")
    prompt = prompt[:LENGTH]
    vocab_size = tokenizer.vocab_size
    settings = Settings(model=str(ERNIE_TINY), dtype="float32", device="cpu", threads=1, kv_cache_memory_bytes=64 << 20)
    core, info = build_engine(settings, vocab_size, lambda share, what: None)
    assert info.max_model_len == CONTEXT
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, logprobs=vocab_size)
    core.add(EngineRequest(request_id="long", prompt_token_ids=prompt, sampling=sampling))
    outputs = []
    while core.has_work:
        outputs += core.step()
    (made,) = outputs[-1].logprobs

    reference = AutoModelForCausalLM.from_pretrained(ERNIE_TINY, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
    expected = logits.log_softmax(-1)
    assert made.token_id == int(expected.argmax())
    ours = torch.tensor([value for _, value in sorted(made.top)])
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
