from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from app.cards.tokens import Example
from app.errors import AppError
from app.training import loop
from app.training.attention import PACKED_ATTENTION
from app.training.device import Precision
from app.training.loop import holdout_loss, step_batches, train
from app.training.packing import labelled_tokens, pack

VOCABULARY = 61
CPU = torch.device("cpu")


def tiny_model(dtype=torch.float64, dropout=0.0, **changes):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **changes,
    )
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    network = LlamaForCausalLM(config)
    if dtype == torch.float64:  # transformers' norms round to float32, whatever the model is
        for layer in network.model.layers:
            layer.input_layernorm = torch.nn.RMSNorm(24, config.rms_norm_eps)
            layer.post_attention_layernorm = torch.nn.RMSNorm(24, config.rms_norm_eps)
        network.model.norm = torch.nn.RMSNorm(24, config.rms_norm_eps)
    return get_peft_model(network, lora).to(dtype)


DOUBLE = tiny_model()


def card(length, prompt_length):
    generator = torch.Generator().manual_seed(100 * length + prompt_length)
    ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
    return Example(tuple(ids.tolist()), prompt_length)


def cards(lengths, prompts):
    return [card(*shape) for shape in zip(lengths, prompts, strict=True)]


SOME_CARDS = cards([9, 30, 14, 22, 5, 17], [4, 11, 6, 21, 2, 3])


def padded_loss(model, examples):
    """The reference: one padded batch, logits everywhere, mean over the labelled tokens."""
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (tokens, prompt) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    ) / sum(map(labelled_tokens, examples))


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def packed_loss_and_gradients(model, examples, max_tokens, prefix_pass_cost=0):
    with loop._ready(model, training=True) as network:
        loss = loop._backward(network, pack(examples, max_tokens, prefix_pass_cost, CPU))
    return loss, gradients(model)


def assert_same_as_padded(model, examples, max_tokens, prefix_pass_cost=0):
    reference = padded_loss(model, examples)
    reference.backward()
    expected = gradients(model)
    loss, found = packed_loss_and_gradients(model, examples, max_tokens, prefix_pass_cost)
    assert abs(loss - reference.item()) < 1e-9
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: a gradient of zero compares nothing"
        assert (found[name] - gradient).abs().max() < 1e-9, name


CARD = st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@given(
    shapes=st.lists(CARD, max_size=6),
    max_tokens=st.integers(1, 120),
    logit_rows=st.integers(1, 40),
)
@settings(max_examples=20, deadline=None)
def test_packed_batches_give_the_loss_and_every_gradient_of_the_padded_batch(
    shapes, max_tokens, logit_rows
):
    # A card of two tokens alone has no gradient at q, which has nothing to choose from.
    examples = [Example(tuple(range(9)), 3), *(card(*shape) for shape in shapes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOGIT_ROWS", {"cpu": logit_rows})
        assert_same_as_padded(DOUBLE, examples, max_tokens)


def sharing(prefix, *tails):
    """Cards that share a prefix; a tail is (question, answer), in tokens."""
    return [
        Example((*prefix, *question, *answer), len(prefix) + len(question))
        for question, answer in tails
    ]


PLAIN = sharing(
    range(8), ([20, 21], [1, 2, 3]), ([22], [4]), ([23, 20, 5], [6, 7, 8, 9]), ([24], [3, 3])
)
EXAM = sharing(range(30, 45), ([1, 2], [50]), ([3], [51]), ([4, 4, 4], [50]))


@pytest.mark.parametrize(
    ("examples", "prefixes"),
    [
        pytest.param(PLAIN, [8], id="one kind"),
        pytest.param([card for pair in zip(PLAIN, EXAM, strict=False) for card in pair],
                     [8, 15], id="two kinds, mixed"),
        pytest.param(SOME_CARDS, [0], id="nothing in common"),
        pytest.param([*PLAIN, SOME_CARDS[1]], [8, 0], id="a stranger among them"),
        pytest.param(sharing(range(9), *[((), [n, 5, n]) for n in range(4)]), [8],
                     id="one prompt: its last token predicts"),
        pytest.param(sharing(range(9), ((), [9, 10, 11]), ((), range(9, 20)), ([9, 10], [11])), [8],
                     id="a card that begins another"),
        pytest.param([PLAIN[0]] * 3, [9], id="the same card"),
        pytest.param([*PLAIN, Example(tuple(range(12)), 0)], [8, 0], id="no prompt"),
        pytest.param(
            sharing(range(6), *[((7, *range(10, 20), n), [1, n]) for n in range(3)],
                  *[((8, *range(20, 30), n), [n, 2]) for n in range(3)]),
            [17, 17], id="kinds within a kind",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cards_that_share_a_prefix_give_the_padded_batch_s_loss_and_gradients(
    examples, prefixes, checkpointing
):
    groups = pack(examples, 30, 0, CPU)
    assert sorted(group.prefix.shape[1] for group in groups) == sorted(prefixes)
    model = tiny_model()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_as_padded(model, examples, max_tokens=30)


TOKEN = st.integers(0, 3)  # so few that cards begin alike by chance, to any depth
TOKENS = st.lists(TOKEN, min_size=1, max_size=12)
RANDOM_CARD = TOKENS.flatmap(
    lambda ids: st.builds(Example, st.just(tuple(ids)), st.integers(0, len(ids)))
)
RANDOM_CARDS = st.lists(RANDOM_CARD, max_size=8)


@given(examples=RANDOM_CARDS, max_tokens=st.integers(1, 40), prefix_pass_cost=st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_whatever_cards_share_the_loss_and_every_gradient_stay(
    examples, max_tokens, prefix_pass_cost
):
    examples = [Example(tuple(range(9)), 3), *examples]
    assert_same_as_padded(DOUBLE, examples, max_tokens, prefix_pass_cost)


@given(examples=RANDOM_CARDS, max_tokens=st.integers(1, 40), prefix_pass_cost=st.integers(0, 12))
def test_prefixes_and_batches_hold_every_card_and_save_what_they_cost(
    examples, max_tokens, prefix_pass_cost
):
    found, run, passes = [], 0, 0
    for group in pack(examples, max_tokens, prefix_pass_cost, CPU):
        prefix = group.prefix[0].tolist()
        run += len(prefix)
        passes += bool(prefix)
        for batch in group.batches:
            run += batch.input_ids.shape[1]
            alone = len(batch.lengths) == 1
            assert alone or len(prefix) + batch.input_ids.shape[1] <= max_tokens
            for ids, positions in zip(
                batch.input_ids[0].split(batch.lengths),
                batch.position_ids[0].split(batch.lengths),
                strict=True,
            ):
                found.append((*prefix, *ids.tolist()))
                assert positions.tolist() == list(range(len(prefix), len(found[-1])))
    labelled = [card.input_ids[:-1] for card in examples if labelled_tokens(card)]
    assert sorted(found) == sorted(labelled)
    assert run + passes * prefix_pass_cost <= sum(map(len, labelled))


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model()
    _, expected = packed_loss_and_gradients(model, SOME_CARDS, 40)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    _, found = packed_loss_and_gradients(model, SOME_CARDS, 40)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_card_s_neighbours_in_a_batch_do_not_change_its_loss():
    model = DOUBLE
    alone = [holdout_loss(model, [card]) * labelled_tokens(card) for card in SOME_CARDS]
    together = holdout_loss(model, SOME_CARDS) * sum(map(labelled_tokens, SOME_CARDS))
    assert abs(sum(alone) - together) < 1e-9


@pytest.mark.parametrize(
    "examples", [SOME_CARDS, PLAIN * 4 + EXAM * 4], ids=["nothing in common", "shared prefixes"]
)
def test_the_held_out_loss_is_the_padded_loss_and_leaves_no_gradient(examples):
    model = tiny_model(dropout=0.5)
    expected = padded_loss(model.eval(), examples).item()
    model.train()
    assert abs(holdout_loss(model, examples) - expected) < 1e-9
    assert model.training, "the mode is given back"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_hold_every_labelled_card_once_and_no_more_tokens_than_asked():
    [group] = pack(SOME_CARDS, 35, 0, CPU)
    lengths = sorted(length for batch in group.batches for length in batch.lengths)
    assert lengths == sorted(len(card.input_ids) - 1 for card in SOME_CARDS)
    assert all(batch.input_ids.shape[1] <= 35 for batch in group.batches)
    assert max(group.batches[0].lengths) == lengths[-1], "peak memory comes first"


def test_a_card_longer_than_a_batch_goes_alone_and_one_without_an_answer_stays_out():
    [group] = pack(cards([30, 9, 8], [3, 9, 2]), 10, 0, CPU)
    assert [batch.lengths for batch in group.batches] == [(29,), (7,)]


def hugging_face_trainer(model, examples, folder, *, steps, batch_size, accumulation, rate, seed):
    """The stock pipeline: transformers' Trainer on padded batches, labels on the answers."""

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key, fill):
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": padded("attention_mask", 0),
        }

    rows = [
        {
            "input_ids": list(ids),
            "labels": [-100] * prompt + list(ids[prompt:]),
            "attention_mask": [1] * len(ids),
        }
        for ids, prompt in examples
    ]
    return Trainer(
        model=model,
        train_dataset=rows,
        data_collator=collate,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=rate,
            lr_scheduler_type="constant",
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
    )


ODD_LAST_BATCH = cards([9, 30, 14, 22, 5, 17, 12], [4, 11, 6, 20, 2, 3, 1])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "examples", [ODD_LAST_BATCH, PLAIN + EXAM], ids=["nothing in common", "shared prefixes"]
)
def test_training_follows_hugging_face_s_trainer_step_by_step(
    tmp_path, monkeypatch, accumulation, examples
):
    monkeypatch.setattr(loop, "PREFIX_PASS_COST", {"cpu": 0})
    stock, ours = tiny_model(torch.float32), tiny_model(torch.float32)
    choices = {"steps": 6, "batch_size": 2}
    trainer = hugging_face_trainer(
        stock, examples, tmp_path, accumulation=accumulation, rate=1e-3, seed=11, **choices
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    result = train(
        ours,
        examples,
        gradient_accumulation=accumulation,
        learning_rate=1e-3,
        order_seed=11,
        dropout_seed=0,
        micro_batch_tokens=40,
        **choices,
    )

    assert result.step_losses == pytest.approx(expected, abs=1e-5)
    assert result.loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    for (name, ours_value), (_, stock_value) in zip(
        ours.named_parameters(), stock.named_parameters(), strict=True
    ):
        assert torch.allclose(ours_value, stock_value, atol=1e-5), name


@given(count=st.integers(1, 50), cards_per_step=st.integers(1, 20), seed=st.integers(0, 2**62))
def test_every_epoch_shows_every_card_once(count, cards_per_step, seed):
    steps = step_batches(count, cards_per_step, seed)
    for _ in range(2):
        epoch = []
        while len(epoch) < count:
            epoch += next(steps)
        assert sorted(epoch) == list(range(count))


def test_another_seed_is_another_order():
    assert next(step_batches(50, 50, 1)) != next(step_batches(50, 50, 2))


def adapter_digest(dropout_seed):
    model = tiny_model(torch.float32, dropout=0.1)
    run(model, dropout_seed=dropout_seed)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def run(model, examples=SOME_CARDS, **changes):
    choices = {
        "steps": 3,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "learning_rate": 1e-3,
        "order_seed": 5,
        "dropout_seed": 6,
        "micro_batch_tokens": 40,
    }
    return train(model, examples, **(choices | changes))


def test_the_same_seeds_give_the_same_adapter_bit_for_bit():
    first = adapter_digest(dropout_seed=7)
    torch.rand(5)  # whatever happened before in this process has no say
    assert adapter_digest(dropout_seed=7) == first
    assert adapter_digest(dropout_seed=8) != first


def test_training_leaves_the_caller_s_random_numbers_alone():
    model = tiny_model(torch.float32, dropout=0.1)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(model)
    assert torch.equal(torch.rand(3), expected)


def test_half_precision_learns_as_fast_as_float32(monkeypatch):
    choices = {"steps": 6, "batch_size": 6, "learning_rate": 3e-2}
    expected = run(tiny_model(torch.float32), **choices).step_losses
    half = Precision(torch.bfloat16, "as on a GPU")
    monkeypatch.setattr(loop, "precision_for", lambda device: half)
    found = run(tiny_model(torch.float32), **choices).step_losses
    assert found == pytest.approx(expected, rel=0.03)


def test_only_the_adapter_changes():
    model = tiny_model(torch.float32)
    before = {name: value.clone() for name, value in model.named_parameters()}
    run(model)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != ("lora_" in name), name


def test_the_result_counts_cards_and_tokens_and_reports_every_step():
    seen = []
    result = run(tiny_model(torch.float32), on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(result.step_losses, start=1))
    assert result.examples == 4 + 2 + 4
    assert result.tokens > sum(len(card.input_ids) for card in SOME_CARDS)
    assert result.seconds > 0
    assert result.peak_memory_bytes > 2**20


def test_the_model_s_own_attention_comes_back_even_after_an_error():
    model = tiny_model(torch.float32)
    before = model.config._attn_implementation
    assert before != PACKED_ATTENTION
    with pytest.raises(AppError):
        run(model, cards([9, 12], [9, 12]))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([], "found none in this node's partition"),
        (cards([9, 12], [9, 12]), "found only answers that were cut off"),
    ],
)
def test_cards_that_teach_nothing_are_refused(examples, expected):
    with pytest.raises(AppError, match=expected):
        run(tiny_model(torch.float32), examples)


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny_model(torch.float32)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(AppError, match="expected a finite loss"):
        run(model)


def test_a_frozen_model_is_refused():
    with pytest.raises(AppError, match="found every parameter frozen"):
        run(tiny_model(torch.float32).requires_grad_(False))


def test_a_trained_output_layer_is_refused():
    model = tiny_model(torch.float32)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(AppError, match="expected a frozen output layer"):
        run(model)


def test_a_head_that_is_more_than_a_linear_map_is_refused():
    model = tiny_model(torch.float32)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(AppError, match="found final_logit_softcapping"):
        run(model)
