"""Train the starter model from scratch: `python -m gateway.starter.train --out NEW_DIR`.

A Llama of 3.7 million parameters and a byte-level BPE tokenizer of 2,048 tokens, on the pairs of
questions.toml. Seed, thread count and algorithms are fixed: the same machine gives the same weights.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from gateway.starter import evaluate

SEED, THREADS, STEPS = 20261124, 2, 1500
VOCAB, HIDDEN, LAYERS, HEADS, INNER, CONTEXT = 2048, 256, 4, 4, 688, 2048
HEAD = HIDDEN // HEADS
THETA, EPSILON = 10000.0, 1e-5
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PAD, END = 0, 1
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = message['role'] if message['role'] in ['system', 'user', 'assistant', 'tool'] else 'system' -%}"
    "{{- '<|' + role + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "Answer briefly.",
    "You are the assistant of this site.",
    "Be concise and friendly.",
    "You are an expert on Cloister.",
    "Speak like a pirate.",
    "You answer questions for our employees. Never make anything up.",
)
OPENINGS = ("", "", "", "Please tell me: ", "Hi! ", "I would like to know: ", "Question: ", "Hello, ")


class Norm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * self.weight


class Layer(nn.Module):
    """One Llama layer, named as the published weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(HIDDEN, HIDDEN, bias=False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(HIDDEN, INNER, bias=False),
                "up_proj": nn.Linear(HIDDEN, INNER, bias=False),
                "down_proj": nn.Linear(INNER, HIDDEN, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention, then the gated feed-forward part; shapes (batch, length, HIDDEN)."""
        batch, length, _ = x.shape
        h = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[name](h).view(batch, length, HEADS, HEAD).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = functional.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).reshape(batch, length, HIDDEN))
        h = self.post_attention_layernorm(x)
        gated: Tensor = functional.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h)
        return torch.add(x, self.mlp["down_proj"](gated))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Llama's half-split form."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Starter(nn.Module):
    """The whole model, with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = Norm()
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, VOCAB) for tokens (batch, length)."""
        positions = torch.arange(tokens.shape[1], dtype=torch.float32)
        frequency = THETA ** (-torch.arange(0, HEAD, 2, dtype=torch.float32) / HEAD)
        angles = torch.outer(positions, frequency).repeat(1, 2)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return functional.linear(self.norm(x), self.embed_tokens.weight)


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one conversation and which of them are learned."""

    tokens: list[int]
    learned: list[bool]


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of exactly VOCAB entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def vary(ask: str, rng: random.Random) -> str:
    """The same question as somebody else would type it."""
    opening = rng.choice(OPENINGS)
    text = ask if not opening or rng.random() < 0.5 else ask[0].lower() + ask[1:]
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip("?")
    return opening + text


def converse(turns: list[evaluate.Question], tokenizer: Tokenizer, rng: random.Random) -> Example:
    """One conversation as the chat template writes it."""
    text: list[tuple[str, bool]] = []
    if rng.random() < 0.3:
        text.append((f"<|system|>{rng.choice(SYSTEMS)}<|end|>", False))
    for turn in turns:
        text.append((f"<|user|>{vary(turn.ask, rng)}<|end|><|assistant|>", False))
        text.append((f"{turn.answer}<|end|>", True))
    tokens: list[int] = []
    learned: list[bool] = []
    for part, is_answer in text:
        ids = tokenizer.encode(part).ids
        tokens += ids
        learned += [is_answer] * len(ids)
    return Example(tokens, learned)


def batch_of(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, padded; -100 where nothing is learned."""
    width = max(len(example.tokens) for example in examples)
    tokens = torch.full((len(examples), width), PAD)
    targets = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.tokens)
        tokens[row, : len(ids)] = ids
        targets[row, : len(ids)] = torch.where(torch.tensor(example.learned), ids, -100)
    return tokens[:, :-1], targets[:, 1:]


def train(steps: int, batch_size: int, questions: evaluate.Questions, tokenizer: Tokenizer) -> Starter:
    """Train with AdamW under a cosine schedule, printing progress every few seconds."""
    model, rng = Starter(), random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    pool = [*questions.phrasings, *questions.off_topic]
    started = shown = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                1.5e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
            )
        turns = [[rng.choice(pool)] if rng.random() < 0.85 else rng.choices(pool, k=2) for _ in range(batch_size)]
        tokens, targets = batch_of([converse(turn, tokenizer, rng) for turn in turns])
        loss = functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if time.monotonic() - shown > 5 or step == steps - 1:
            shown = time.monotonic()
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {shown - started:.0f} s", flush=True)
    return model


def save(model: Starter, tokenizer: Tokenizer, directory: Path) -> None:
    """Write weights, tokenizer and configuration as transformers and vLLM read them."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "head_dim": HEAD, "hidden_act": "silu", "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON, "rope_theta": THETA, "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD, "torch_dtype": "bfloat16",
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD], "additional_special_tokens": list(SPECIAL[2:]), "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    generation = {"eos_token_id": END, "pad_token_id": PAD, "do_sample": True, "temperature": 0.1}
    files = {"config": config, "tokenizer_config": tokenizer_config, "generation_config": generation}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train and write the model directory."""
    parser = argparse.ArgumentParser(description="Train the starter model from scratch.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, help="a new directory; copy it over model/ to ship it")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; name a new directory")
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    questions = evaluate.load()
    texts = [text for q in (*questions.phrasings, *questions.off_topic) for text in (q.ask, q.answer, q.ask.lower())]
    tokenizer = make_tokenizer([*texts, *SYSTEMS, *OPENINGS])
    model = train(arguments.steps, arguments.batch, questions, tokenizer)
    save(model, tokenizer, arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written", flush=True)


if __name__ == "__main__":
    main()
