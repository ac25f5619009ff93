"""A GGUF file of random weights in the 21B's geometry, for llama.cpp's benchmarks. Runs where `gguf` is installed.

Knows what the architecture `ernie4_5-moe` needs, and the tensor types that quantizing to Q4_0 picks: Q6_K for the
embedding, which is the head too, F32 for norms and routers, Q4_0 for the rest. Numbers are drawn once and repeated.
"""

import argparse

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HIDDEN, DENSE, EXPERT, EXPERTS, ACTIVE, SHARED = 2560, 12288, 1536, 64, 6, 2
HEADS, KV_HEADS, HEAD_DIM, VOCAB = 20, 4, 128, 103424
SPREAD = 0.02  # standard deviation of weights, about
BLOCKS = 1 << 16  # in a pool


def tensors(layers: int) -> list[tuple[str, tuple[int, ...], Type]]:
    """Name, shape and type of everything in the file, in order."""
    q4, f32 = Type.Q4_0, Type.F32
    found = [("token_embd.weight", (VOCAB, HIDDEN), Type.Q6_K), ("output_norm.weight", (HIDDEN,), f32)]
    for layer in range(layers):
        parts = [
            ("attn_norm", (HIDDEN,), f32),
            ("ffn_norm", (HIDDEN,), f32),
            ("attn_q", (HEADS * HEAD_DIM, HIDDEN), q4),
            ("attn_k", (KV_HEADS * HEAD_DIM, HIDDEN), q4),
            ("attn_v", (KV_HEADS * HEAD_DIM, HIDDEN), q4),
            ("attn_output", (HIDDEN, HEADS * HEAD_DIM), q4),
        ]
        if layer == 0:
            parts += [
                ("ffn_gate", (DENSE, HIDDEN), q4),
                ("ffn_up", (DENSE, HIDDEN), q4),
                ("ffn_down", (HIDDEN, DENSE), q4),
            ]
        else:
            parts += [
                ("ffn_gate_inp", (EXPERTS, HIDDEN), f32),
                ("ffn_gate_exps", (EXPERTS, EXPERT, HIDDEN), q4),
                ("ffn_up_exps", (EXPERTS, EXPERT, HIDDEN), q4),
                ("ffn_down_exps", (EXPERTS, HIDDEN, EXPERT), q4),
                ("ffn_gate_shexp", (SHARED * EXPERT, HIDDEN), q4),
                ("ffn_up_shexp", (SHARED * EXPERT, HIDDEN), q4),
                ("ffn_down_shexp", (HIDDEN, SHARED * EXPERT), q4),
            ]
            found.append((f"blk.{layer}.exp_probs_b.bias", (EXPERTS,), f32))
        found += [(f"blk.{layer}.{part}.weight", shape, kind) for part, shape, kind in parts]
    return found


def pools(chance: np.random.Generator) -> dict[Type, np.ndarray]:
    """Random blocks of each packed type, as bytes: a half-precision scale, and evenly spread numbers."""

    def half(value: float) -> np.ndarray:
        return np.full((BLOCKS, 1), value, np.float16).view(np.uint8)

    def noise(count: int) -> np.ndarray:
        return np.frombuffer(chance.bytes(BLOCKS * count), np.uint8).reshape(BLOCKS, count)

    scales = np.full((BLOCKS, 16), 64, np.uint8)
    return {
        Type.Q4_0: np.concatenate([half(SPREAD / 4.6), noise(16)], 1),
        Type.Q6_K: np.concatenate([noise(192), scales, half(SPREAD / (18.5 * 64))], 1),
    }


def contents(
    name: str, shape: tuple[int, ...], kind: Type, packed: dict[Type, np.ndarray], chance: np.random.Generator
):
    """The numbers or bytes of one tensor."""
    if kind == Type.F32:
        if "norm" in name:
            return np.ones(shape, np.float32)
        spread = 0.25 / EXPERTS if "bias" in name else HIDDEN**-0.5
        return (chance.standard_normal(shape) * spread).astype(np.float32)
    bytes_ = np.roll(packed[kind], int(chance.integers(BLOCKS)), 0).reshape(-1)
    return np.resize(bytes_, num_bytes(shape, kind))


def num_bytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def write(path: str, layers: int) -> None:
    chance = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "ernie4_5-moe")
    writer.add_name(f"random-{layers}")
    writer.add_context_length(131072)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(DENSE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(ACTIVE)
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_feed_forward_length(EXPERT)
    writer.add_expert_shared_count(SHARED)
    writer.add_expert_shared_feed_forward_length(SHARED * EXPERT)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_vocabulary(writer)
    listed = tensors(layers)
    for name, shape, kind in listed:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if kind == Type.F32:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes(shape, kind))
        else:
            stored = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), num_bytes(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    packed = pools(chance)
    for name, shape, kind in listed:
        writer.write_tensor_data(contents(name, shape, kind, packed, chance))
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    kinds += [gguf.TokenType.NORMAL] * (VOCAB - len(tokens))
    tokens += [f"\u2581w{index}" for index in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores([-float(index) for index in range(VOCAB)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--layers", type=int, default=28)
    given = parser.parse_args()
    write(given.path, given.layers)
