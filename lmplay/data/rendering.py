"""Rows to documents: which columns hold the text, the prompt and what is learned."""

import json
from contextlib import suppress

from lmplay.data.document import Document
from lmplay.data.local_files import Place, jq_command
from lmplay.data.tokenizers import valid
from lmplay.errors import UserError, nearest
from lmplay.plan import Dataset

_NAME_COLUMNS = (
    "name its columns in the plan, or with --data: --set 'datasets.data.text=[\"NAME\"]'; "
    "prompt and truth, or messages, can be set likewise"
)


def columns_of(dataset: Dataset) -> list:
    """What a plan says about the columns: text, prompt, truth, messages."""
    return [dataset.text, dataset.prompt, dataset.truth, dataset.messages]


class Renderer:
    """Rows of one file to documents, by the columns that the plan names or the file has."""

    def __init__(self, dataset: Dataset, where: str | Place):
        self._dataset, self._where = dataset, where
        self._text, self._prompt, self._truth, self._messages = columns_of(dataset)
        self._known = False
        self._learned: list[str] = []  # columns without which a row says nothing

    def needed(self, names: list[str]) -> list[str]:
        """The columns to read of those that there are."""
        if not self._known:
            self._known = True
            if not any(columns_of(self._dataset)):
                self._detect(names)
        if self._messages:
            needed = [self._messages]
        elif self._prompt:
            needed = [*self._prompt, self._truth]
        else:
            needed = self._text
        self._learned = [self._truth] if self._truth else needed
        for name in needed:
            if name not in names:
                raise UserError(
                    f"{self._where} has no column {name!r}; it has {', '.join(names)}",
                    hint=nearest(name, names) + _NAME_COLUMNS,
                )
        return needed

    def __call__(self, row: dict, number: int) -> Document | None:
        if not self._known:
            self._refuse_a_wrapper(row)
            self.needed(list(row))
        if row.keys().isdisjoint(self._learned):
            raise UserError(
                f"{self._where} has no column {self._learned[0]!r}; it has {', '.join(row)}",
                hint="leave such rows out of the file, or give them the column",
            )
        if self._messages:
            prompt, truth = self._chat(row)
        elif self._prompt:
            prompt = self._joined(row, self._prompt)
            prompt = prompt + "\n\n" if prompt else ""
            truth = self._string(row, self._truth)
        else:
            prompt, truth = self._joined(row, self._text), None
        if not (prompt if truth is None else truth).strip():
            return None
        return Document(valid(prompt), truth if truth is None else valid(truth), number)

    def _refuse_a_wrapper(self, row: dict) -> None:
        """Raise a UserError where the rows are a list inside of what seems to be the first one."""
        if any(columns_of(self._dataset)) or {"messages", "prompt", "text"} & row.keys():
            return
        for key, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                path = getattr(self._where, "source", None)
                hint = jq_command(path, f".[{json.dumps(key)}][]") if path else _NAME_COLUMNS
                raise UserError(f"{self._where}: the rows seem to be inside of {key!r}", hint=hint)

    def _detect(self, names: list[str]) -> None:
        if "messages" in names:
            self._messages = "messages"
        elif "prompt" in names and "truth" in names:
            self._prompt, self._truth = ["prompt"], "truth"
        elif "text" in names:
            self._text = ["title", "text"] if "title" in names else ["text"]
        else:
            raise UserError(
                f"{self._where} has none of the columns messages, prompt and truth, text; "
                f"it has {', '.join(names)}",
                hint=_NAME_COLUMNS,
            )

    def _joined(self, row: dict, columns: list[str]) -> str:
        texts = (self._string(row, column) for column in columns)
        return "\n\n".join(text for text in texts if text.strip())

    def _string(self, row: dict, column: str) -> str:
        value = row.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise UserError(
                f"column {column!r} of {self._where} holds {type(value).__name__}, not text",
                hint="a column of text is needed; " + _NAME_COLUMNS,
            )
        return value

    def _chat(self, row: dict) -> tuple[str, str]:
        """All before the last assistant turn, and that turn; what follows it is left out."""
        turns = row.get(self._messages) or []
        if isinstance(turns, dict) and all(isinstance(v, list) for v in turns.values()):
            with suppress(ValueError):  # a table of columns, as older datasets give it
                rows = list(zip(*turns.values(), strict=True))
                turns = [dict(zip(turns, values, strict=True)) for values in rows]
        if not isinstance(turns, list) or not all(
            isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns
        ):
            raise UserError(
                f"column {self._messages!r} of {self._where} is no list of role and content",
                hint="name a column of chats as messages in the plan",
            )
        last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=None)
        if last is None:
            return "", ""
        said = [
            f"{self._string(t, 'role').capitalize()}:\n{self._string(t, 'content')}\n\n"
            for t in turns[:last]
        ]
        return "".join([*said, "Assistant:\n"]), self._string(turns[last], "content")
