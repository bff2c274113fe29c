"""An experiment of lmplay as a causal language model of transformers.

This file is copied into an exported folder: `experiment` is there the file that was trained,
`abilities`, `cache` and `folding` are lmplay's own, and config.json says how the model was made.
"""

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .abilities import has_hidden, head_of, reader, set_progress, takes_cache
from .cache import Cache
from .experiment import Config, Model
from .folding import folded

# B rows, T positions, C model width, V vocabulary


class LmplayConfig(PreTrainedConfig):
    """What config.json holds: `values` of the experiment's Config, whether it is `folded`, and the
    `progress` of the run when it was saved.
    """

    # one of the library's own types, for which it has neither model nor tokenizer. AutoTokenizer
    # begins with AutoConfig, which asks to run this file where it does not know the type, whatever
    # tokenizer_config.json says (transformers 5.23); a plain tokenizer.json never needs that
    model_type = "musicgen_decoder"


class Past(Cache):
    """The cache of one generation, as transformers asks for it."""

    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


class _Lmplay(PreTrainedModel):
    config_class = LmplayConfig
    base_model_prefix = "model"
    _supports_sdpa = True  # that is to say: asked for or not, an experiment attends as it does

    def __init__(self, config: LmplayConfig):
        super().__init__(config)
        self._take(_made(config))
        self.takes_cache = takes_cache(self.model)
        self.post_init()

    def _take(self, model: nn.Module) -> None:
        self.model = model
        first: dict[int, str] = {}
        names = [(id(w), name) for name, w in self.named_parameters(remove_duplicate=False)]
        ties = {name: first[i] for i, name in names if first.setdefault(i, name) != name}
        self._tied_weights_keys = ties

    def get_input_embeddings(self) -> nn.Embedding:
        """The table that tokens are looked up in.

        Raises:
            NotImplementedError: the experiment has none of its vocabulary's size, or several.
        """
        size = self.config.vocab_size
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding)]
        found = [table for table in tables if table.num_embeddings == size]
        if len(found) != 1:
            raise NotImplementedError(f"this experiment has {len(found)} tables of {size} tokens")
        return found[0]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another table of tokens in the place of that which `get_input_embeddings` gives.

        Raises:
            NotImplementedError: as of `get_input_embeddings`.
        """
        table = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is table)
        self.set_submodule(name, value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_, **__
    ) -> nn.Embedding:
        """Make the vocabulary larger or smaller, and give the table that tokens are looked up in.

        The experiment is made anew with the other size. What both sizes have keeps its value; what
        is new is as at the start of a training.

        Raises:
            NotImplementedError: a parameter depends on the size in another way than by having it.
        """
        old, multiple = self.config.vocab_size, pad_to_multiple_of or 1
        new = -(-(new_num_tokens or old) // multiple) * multiple
        if new != old:
            self._resize(old, new)
        return self.get_input_embeddings()

    @torch.no_grad()
    def _resize(self, old: int, new: int) -> None:
        config = copy.deepcopy(self.config)
        config.vocab_size = config.values["vocab_size"] = new
        model, mine = _made(config).to(self.device, self.dtype), self.model.state_dict()
        for name, tensor in model.state_dict().items():
            pairs = list(zip(mine[name].shape, tensor.shape, strict=True))
            if any(was != now and (was, now) != (old, new) for was, now in pairs):
                raise NotImplementedError(f"{name} does not go over to a vocabulary of {new}")
            kept = tuple(slice(min(pair)) for pair in pairs)
            tensor[kept] = mine[name][kept]
        self.config.vocab_size, self.config.values = new, config.values
        self._take(model.train(self.training))

    def _hidden(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        past: Past | None,
        use_cache: bool | None,
        position_ids: Tensor | None,
        output_hidden_states: bool | None,
        **unknown,
    ) -> tuple[Tensor, Past | None, tuple[Tensor, ...] | None]:
        """What the head reads, or the logits of a model that has none; the past; the states.

        Raises:
            ValueError: no text, or one longer than the context; a past of another kind; a mask with
                holes, or with padding before a row that has a past; positions that do not count on
                from the past.
            NotImplementedError: something is asked for that no experiment knows.
        """
        for name, value in unknown.items():
            if value is not None and value is not False:
                raise NotImplementedError(f"an experiment of lmplay knows no {name}")
        if input_ids is None:
            raise ValueError("input_ids are missing")
        if past is not None and not isinstance(past, Past):
            kind = type(past).__name__
            raise ValueError(f"a {kind} is no past of this model's: give what an earlier pass gave")
        start = past.length if past is not None else 0
        num_positions = input_ids.shape[1] + start
        if num_positions > self.config.max_position_embeddings:
            longest = self.config.max_position_embeddings
            raise ValueError(f"the text has {num_positions} tokens, the context holds {longest}")
        if position_ids is not None:
            _refuse_other_positions(position_ids, attention_mask, start)
        place_BT = None if attention_mask is None else _places(attention_mask)
        if place_BT is not None:
            if past is not None:
                raise ValueError("rows with padding before them have no past: leave it out")
            input_ids = input_ids.gather(1, place_BT)
        elif use_cache and past is None and self.takes_cache:
            past = Past(self.config.max_position_embeddings)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        seen = _States(self.model) if output_hidden_states else nullcontext()
        with seen:
            x_BTC = self._read(input_ids, past)
        if past is not None and not past.used:
            past = None
        states = seen.states() if output_hidden_states else None
        if place_BT is not None:
            x_BTC = _moved_back(x_BTC, place_BT)
            states = states and tuple(_moved_back(state, place_BT) for state in states)
        return x_BTC, past, states

    def _read(self, tokens_BT: Tensor, past: Past | None) -> Tensor:
        """The hidden states, or the logits of a model that has none; one by one behind a past."""
        if past is None:
            return reader(self.model)(tokens_BT)
        parts = []
        for some_BT in tokens_BT.split(1, 1) if past.length else [tokens_BT]:
            parts.append(reader(self.model)(some_BT, cache=past))
            past.advance(some_BT.shape[1])
        return torch.cat(parts, 1)


class LmplayModel(_Lmplay):
    """The experiment without its head, as `AutoModel` opens it."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """What the head would read, as `last_hidden_state` (B, T, C).

        Arguments and errors are those of `LmplayForCausalLM.forward`.
        """
        if not has_hidden(self.model):
            raise NotImplementedError("this experiment has logits only: AutoModelForCausalLM")
        x_BTC, past, states = self._hidden(
            input_ids, attention_mask, past_key_values, use_cache, position_ids,
            output_hidden_states, inputs_embeds=inputs_embeds, output_attentions=output_attentions,
        )  # fmt: skip
        output = BaseModelOutputWithPast(
            last_hidden_state=x_BTC, past_key_values=past, hidden_states=states
        )
        return output.to_tuple() if return_dict is False else output


class LmplayForCausalLM(_Lmplay, GenerationMixin):
    """The experiment; rows of different lengths are padded on either side."""

    _is_stateful = True  # the past cannot be cut back, as assisted generation would

    def get_output_embeddings(self) -> nn.Linear | None:
        """The map from the hidden states to the logits, where it is no more than a matrix."""
        return head_of(self.model)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Past | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the token after each position, and with `labels` the loss of the next token.

        Args:
            input_ids: (B, T); with a past, what follows it.
            attention_mask: (B, past and T), 0 at padding. Causality hides what stands behind a
                row; what stands before it is moved there, and such rows have no cache.
            past_key_values: what an earlier pass with `use_cache` gave.
            labels: (B, T), shifted in here; -100 is not scored.
            logits_to_keep: this many last positions only, or these; 0 for all.
            position_ids: (B, T) or (1, T); each row's must count on from its past, as they do
                anyway.
            output_hidden_states: give what enters the first block and what leaves each, (B, T, C).
            inputs_embeds, output_attentions: no experiment has a place for them.
        Raises:
            ValueError, NotImplementedError: as of `_hidden`.
        """
        x_BTC, past, states = self._hidden(
            input_ids, attention_mask, past_key_values, use_cache, position_ids,
            output_hidden_states, inputs_embeds=inputs_embeds, output_attentions=output_attentions,
        )  # fmt: skip
        is_count = isinstance(logits_to_keep, int)
        x_BTC = x_BTC[:, slice(-logits_to_keep, None) if is_count else logits_to_keep]
        logits_BTV = self.model.head(x_BTC) if has_hidden(self.model) else x_BTC
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, vocab_size=logits_BTV.shape[-1])
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, past_key_values=past, hidden_states=states
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Past | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        **_,
    ) -> dict:
        """What `forward` is given at each step: the whole text, or what is behind the past."""
        start = past_key_values.length if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, start:].to(self.device),
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "output_hidden_states": output_hidden_states,
        }

    def _reorder_cache(self, past: Past | None, beam_idx: Tensor) -> Past | None:
        """The past, if no beam changed its row; else none, and the beams are read anew."""
        stay = torch.arange(len(beam_idx), device=beam_idx.device)
        return past if torch.equal(beam_idx, stay) else None


def _made(config: LmplayConfig) -> nn.Module:
    model = Model(Config(**config.values))
    set_progress(model, config.progress)
    return folded(model) if config.folded else model


class _States:
    """While entered, keeps what enters the first block of a model and what leaves each block."""

    def __init__(self, model: nn.Module):
        lists = [m for m in model.children() if isinstance(m, nn.ModuleList) and len(m) > 0]
        self._blocks = list(max(lists, key=len, default=[]))
        self._kept: list[list[Tensor]] = [[] for _ in range(len(self._blocks) + 1)]

    def __enter__(self):
        self._hooks = [
            block.register_forward_hook(lambda _, args, y_BTC, i=i: self._keep(i, args, y_BTC))
            for i, block in enumerate(self._blocks, start=1)
        ]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _keep(self, number: int, args: tuple, y_BTC: Tensor) -> None:
        if number == 1:
            self._kept[0].append(args[0])
        self._kept[number].append(y_BTC)

    def states(self) -> tuple[Tensor, ...]:
        """Each (B, T, C).

        Raises:
            NotImplementedError: the experiment is no stack of blocks that hand on one tensor.
        """
        if not self._blocks or not all(
            parts and all(isinstance(part, Tensor) and part.dim() == 3 for part in parts)
            for parts in self._kept
        ):
            raise NotImplementedError("this experiment is no stack of blocks to look between")
        return tuple(torch.cat(parts, 1) for parts in self._kept)


def _refuse_other_positions(position_ids: Tensor, mask_BT: Tensor | None, start: int) -> None:
    """Raise a ValueError unless tokens stand where this model puts them."""
    T = position_ids.shape[-1]
    if mask_BT is None:
        differs = position_ids != torch.arange(start, start + T, device=position_ids.device)
    else:
        place_BT = mask_BT.long().cumsum(1) - 1
        differs = (position_ids != place_BT[:, -T:]) & mask_BT[:, -T:].bool()
    if differs.any():
        raise ValueError("positions other than one after another are not this model's")


def _moved_back(x_BTC: Tensor, place_BT: Tensor) -> Tensor:
    back_BT1 = place_BT.argsort(1)[..., None]
    return x_BTC.gather(1, back_BT1.expand(-1, -1, x_BTC.shape[-1]))


def _places(mask_BT: Tensor) -> Tensor | None:
    """Where each row's tokens are, with what stands before them moved behind; None if nothing."""
    if mask_BT.bool().all():
        return None
    T = mask_BT.shape[1]
    start_B1 = mask_BT.long().argmax(1, keepdim=True)
    place_BT = (torch.arange(T, device=mask_BT.device) + start_B1) % T
    if (mask_BT.long().gather(1, place_BT).diff() > 0).any():
        raise ValueError("the attention mask has holes: padding stands before or behind a row")
    return place_BT if start_B1.any() else None
