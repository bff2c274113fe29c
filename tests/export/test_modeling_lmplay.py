"""The wrapper keeps the promises that users of transformers rely on."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lmplay.catalog.entries import resolve
from lmplay.export.export import export
from lmplay.run.trained import open_trained

GREEDY = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 8}


def tokens(B=2, T=10):
    return torch.randint(256, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(make_run, opened, tmp_path):
    export(make_run("ue"), None, "hf", True, tmp_path / "out")
    return opened(tmp_path / "out")


def padded(rows, side):
    """Rows of one length, and their mask."""
    T = max(map(len, rows))
    pads = [torch.full((T - len(row),), 7) for row in rows]
    pairs = zip(rows, pads, strict=True)
    parts = [(pad, row) if side == "left" else (row, pad) for row, pad in pairs]
    mask_BT = torch.stack([torch.arange(T) < len(row) for row in rows]).long()
    return torch.stack([torch.cat(p) for p in parts]), mask_BT.flip(
        1
    ) if side == "left" else mask_BT


ROWS = [tokens(1, T)[0] for T in (9, 4, 1)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(model, side):
    tokens_BT, mask_BT = padded(ROWS, side)
    logits_BTV = model(tokens_BT, attention_mask=mask_BT).logits
    kept_BTV = model(tokens_BT, attention_mask=mask_BT, logits_to_keep=3).logits

    assert torch.equal(kept_BTV, logits_BTV[:, -3:])
    for row, logits_TV, mask_T in zip(ROWS, logits_BTV, mask_BT.bool(), strict=True):
        torch.testing.assert_close(logits_TV[mask_T], model(row[None]).logits[0])


def test_rows_of_different_lengths_are_written_as_each_alone(model):
    tokens_BT, mask_BT = padded(ROWS, "left")
    written_BT = model.generate(tokens_BT, attention_mask=mask_BT, **GREEDY)

    for row, written_T in zip(ROWS, written_BT, strict=True):
        alone_1T = model.generate(row[None], **GREEDY)
        assert torch.equal(written_T[-8:], alone_1T[0, -8:])


@pytest.mark.parametrize("beams", [1, 3])
def test_the_cache_changes_no_text_and_is_used(model, beams, monkeypatch):
    lengths = []
    hidden = model.model.hidden
    monkeypatch.setattr(
        model.model, "hidden", lambda t, **k: lengths.append(t.shape[1]) or hidden(t, **k)
    )
    cached = model.generate(tokens(), num_beams=beams, **GREEDY)
    seen = list(lengths)
    plain = model.generate(tokens(), num_beams=beams, use_cache=False, **GREEDY)

    assert torch.equal(cached, plain)
    assert seen[0] == 10 and (seen[1:] == [1] * 7 or beams > 1)


def test_an_experiment_without_a_cache_reads_the_whole_text_at_each_step(
    make_run, opened, tmp_path
):
    entry = resolve("gpt2ish")
    signature = "def forward(self, tokens_BT: Tensor, cache=None)"
    plain = entry.source.replace("block(x_BTC, cache)", "block(x_BTC)")
    texts = {
        "ignores": plain,
        "lacks": plain.replace(signature, signature.replace(", cache=None", ""))
        .replace("self.hidden(tokens_BT, cache)", "self.hidden(tokens_BT)")
        .replace("def hidden(self, tokens_BT: Tensor, cache=None)", "def hidden(self, tokens_BT)")
        .replace("cache.length if cache is not None else 0", "0"),
        "reads": entry.source,
    }
    written = {}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        own = tmp_path / name / "gpt2ish.py"
        own.write_text(text)
        export(make_run(str(own)), None, "hf", True, tmp_path / name / "out")
        model = opened(tmp_path / name / "out")
        written[name] = model.generate(tokens(), **GREEDY)
        past = model(tokens(), use_cache=True).past_key_values
        assert (past is None) is (name != "reads")

    assert texts["ignores"] != texts["lacks"] != texts["reads"]
    assert torch.equal(written["ignores"], written["reads"])
    assert torch.equal(written["lacks"], written["reads"])


@torch.no_grad()
def test_a_past_goes_on_with_several_tokens(model):
    whole = model(tokens()).logits
    first = model(tokens()[:, :4], use_cache=True)
    second = model(tokens()[:, 4:], past_key_values=first.past_key_values)

    assert second.past_key_values.get_seq_length() == 10
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)


@torch.no_grad()
def test_labels_are_shifted_once_and_ignored_where_they_say_so(model):
    labels_BT = tokens().clone()
    labels_BT[0, :5] = -100
    logits_BTV = model(tokens()).logits
    nats = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())

    torch.testing.assert_close(model(tokens(), labels=labels_BT).loss, nats)
    torch.testing.assert_close(model(tokens(), labels=labels_BT, return_dict=False)[0], nats)


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, {"use_cache": True}])
def test_a_text_longer_than_the_context_is_refused(model, given):
    with pytest.raises(ValueError, match="has 25 tokens, the context holds 24"):
        model(tokens(T=25), **given)
    with pytest.raises(ValueError, match="has 25 tokens, the context holds 24"):
        model.generate(tokens(), do_sample=False, eos_token_id=-1, max_new_tokens=16)
    assert model.generate(tokens(), do_sample=False, max_new_tokens=14).shape[1] <= 24


def test_what_the_cache_cannot_express_is_refused(model):
    holes_BT = torch.ones(2, 10, dtype=torch.long)
    holes_BT[0, 4] = 0
    with pytest.raises(ValueError, match="holes"):
        model(tokens(), attention_mask=holes_BT)
    past = model(tokens(), use_cache=True).past_key_values
    before_BT = torch.ones(2, 11, dtype=torch.long)
    before_BT[0, 0] = 0
    with pytest.raises(ValueError, match="padding before them have no past"):
        model(tokens(T=1), attention_mask=before_BT, past_key_values=past)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens(1), assistant_model=model, max_new_tokens=4)


def test_text_comes_out_of_a_pipeline_as_out_of_lmp_generator(
    make_run, transformers, tmp_path, capsys, monkeypatch
):
    from lmplay.generate.cli import app

    folder = make_run("value_norm")
    export(folder, None, "hf", True, tmp_path / "out")
    write = transformers.pipeline("text-generation", str(tmp_path / "out"), trust_remote_code=True)
    [made] = write("def", max_new_tokens=12, do_sample=False)
    capsys.readouterr()
    app(
        [str(folder.path), "def", "--greedy", "--max-tokens", "12", "--device", "cpu"],
        standalone_mode=False,
    )

    assert made["generated_text"] == capsys.readouterr().out.removesuffix("\n")


@torch.no_grad()
def test_weights_are_trained_saved_and_opened_in_half_precision(
    model, opened, transformers, tmp_path
):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        losses = []
        for _ in range(5):
            loss = model.train()(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval().save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True, dtype=torch.bfloat16
    )

    assert losses[-1] < losses[0]
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert half.dtype == half(tokens()).logits.dtype == torch.bfloat16
    assert Path(tmp_path / "again/experiment.py").is_file()


@pytest.mark.slow
def test_the_evaluation_harness_scores_as_lmplay_does(make_run, transformers, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = make_run("ue")
    export(folder, None, "hf", True, tmp_path / "out")
    scorer = HFLM(str(tmp_path / "out"), trust_remote_code=True, device="cpu", batch_size=4)
    pairs = [("import", " os"), ("", "for i in\n"), ("def main(", "self):")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    trained = open_trained(folder, None, "cpu", "fp32")
    end = trained.tokenizer.end

    for (before, after), (scored, _) in zip(pairs, scorer.loglikelihood(asked), strict=True):
        ids = torch.tensor([end, *trained.tokenizer.encode(before + after)])
        logp_TV = trained.model(ids[None, :-1])[0].log_softmax(-1)
        logp_T = logp_TV.gather(1, ids[1:, None])[-len(after) :]
        assert scored == pytest.approx(logp_T.sum().item(), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_are_what_blocks_hand_on(model, side):
    tokens_BT, mask_BT = padded(ROWS, side)
    states = model(tokens_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
    alone = [model(row[None], output_hidden_states=True).hidden_states for row in ROWS]

    assert len(states) == len(model.model.blocks) + 1
    for b, (row_states, mask_T) in enumerate(zip(alone, mask_BT.bool(), strict=True)):
        for state_BTC, alone_1TC in zip(states, row_states, strict=True):
            torch.testing.assert_close(state_BTC[b][mask_T], alone_1TC[0])
    assert model(tokens()).hidden_states is None


@torch.no_grad()
def test_hidden_states_behind_a_past_are_those_of_the_whole(model):
    whole = model(tokens(), output_hidden_states=True).hidden_states
    past = model(tokens()[:, :7], use_cache=True).past_key_values
    rest = model(tokens()[:, 7:], past_key_values=past, output_hidden_states=True).hidden_states

    for state_BTC, whole_BTC in zip(rest, whole, strict=True):
        torch.testing.assert_close(state_BTC, whole_BTC[:, 7:], atol=1e-5, rtol=1e-5)


def test_positions_may_be_given_as_they_are_and_in_no_other_way(model):
    plain = model(tokens()).logits

    assert torch.equal(model(tokens(), position_ids=torch.arange(10)[None]).logits, plain)
    for other_T in (torch.arange(10).flip(0), torch.arange(5, 15)):
        with pytest.raises(ValueError, match="one after another"):
            model(tokens(), position_ids=other_T[None])
    past = model(tokens()[:, :7], use_cache=True).past_key_values
    rest = model(tokens()[:, 7:], past_key_values=past, position_ids=torch.arange(7, 10)[None])
    torch.testing.assert_close(rest.logits, plain[:, 7:])
    padded_BT, mask_BT = padded(ROWS, "left")
    place_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(
        model(padded_BT, attention_mask=mask_BT, position_ids=place_BT).logits,
        model(padded_BT, attention_mask=mask_BT).logits,
    )


def test_what_no_experiment_has_is_refused_in_words(model):
    for asked in ({"inputs_embeds": torch.zeros(1, 3, 16)}, {"output_attentions": True}):
        with pytest.raises(NotImplementedError, match=next(iter(asked))):
            model(tokens(), **asked)
    model(tokens(), output_attentions=False)


def test_the_table_of_tokens_can_be_had_and_resized(model, opened, tmp_path):
    table, plain = model.get_input_embeddings(), model(tokens()).logits

    assert table.num_embeddings == 257 and model.resize_token_embeddings(257) is table
    larger = model.resize_token_embeddings(258, pad_to_multiple_of=8)
    assert larger is model.get_input_embeddings() and larger.num_embeddings == 264
    logits = model(tokens()).logits
    assert logits.shape[-1] == 264 and torch.equal(logits[..., :257], plain)
    model(torch.full((1, 3), 263), labels=torch.full((1, 3), 263)).loss.backward()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(opened(tmp_path / "again")(tokens()).logits, logits)
    model.resize_token_embeddings(257)
    assert torch.equal(model(tokens()).logits, plain)


def test_both_tables_have_their_usual_names_and_may_be_replaced(model):
    table = torch.nn.Embedding(model.config.vocab_size, model.get_input_embeddings().embedding_dim)
    model.set_input_embeddings(table)

    assert model.get_input_embeddings() is table
    assert model.get_output_embeddings().weight.shape == table.weight.shape


def test_some_positions_logits_are_those_of_all(model):
    tokens_BT = torch.arange(12).reshape(2, 6)
    logits_BTV = model(tokens_BT).logits

    chosen = torch.tensor([1, 4])
    for keep, places in ((2, slice(-2, None)), (chosen, chosen)):
        kept_BTV = model(tokens_BT, logits_to_keep=keep).logits
        torch.testing.assert_close(kept_BTV, logits_BTV[:, places])


def test_a_past_of_another_kind_and_no_text_are_refused_in_words(model, transformers):
    with pytest.raises(ValueError, match="DynamicCache is no past"):
        model(torch.ones(1, 2, dtype=torch.long), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="input_ids are missing"):
        model()


def test_generating_gives_hidden_states(model):
    made = model.generate(
        tokens(1), output_hidden_states=True, return_dict_in_generate=True, **GREEDY
    )

    assert len(made.hidden_states) == 8
    assert all(len(states) == len(model.model.blocks) + 1 for states in made.hidden_states)


def test_the_model_without_its_head_is_opened_by_auto_model(model, transformers, tmp_path):
    base = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    states = base(tokens(), output_hidden_states=True)

    assert torch.equal(model.model.head(states.last_hidden_state), model(tokens()).logits)
    assert len(states.hidden_states) == len(model.model.blocks) + 1


def test_the_tokenizer_is_opened_without_a_question_and_without_our_code(
    make_run, transformers, tmp_path, monkeypatch, caplog
):
    export(make_run("value_norm"), None, "hf", True, tmp_path / "out")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks to run our code"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")

    assert type(tokenizer).__module__.startswith("transformers.")
    assert tokenizer("ab").input_ids == [256, 97, 98]
    assert tokenizer.decode([97, 98]) == "ab"
    with pytest.raises(ValueError, match="trust_remote_code"):
        monkeypatch.undo()
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
