"""`anychip chat`: a conversation in the terminal, or one question a line from a pipe."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from anychip.errors import InputError
from anychip.serve.streams import use_utf8
from anychip.serve.talker import Talker, WeightType, open_talker

if TYPE_CHECKING:
    from anychip.serve.engine import Session

_HELP = "/reset forgets the conversation, /exit leaves (so does Ctrl-D), Ctrl-C ends an answer."
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def chat(
    path: Path,
    *,
    system: str = "",
    sampling: Mapping[str, Any] | None = None,
    seed: int | None = None,
    weights: WeightType = "auto",
) -> None:
    """Talk to the model in a run or an export.

    On a terminal: a prompt, answers as they are made, /reset and /exit. Otherwise every line of standard input is a
    question of one conversation, and only the answers go to standard output, each followed by a line end. Without
    `seed` each conversation is another one; with it, the same questions get the same answers.
    """
    talker = open_talker(path, sampling or {}, weights)
    conversation = Conversation(talker, system, time.time_ns() if seed is None else seed)
    use_utf8(sys.stdin, sys.stdout)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _on_terminal(conversation, str(path))
    else:
        _on_pipe(conversation, sys.stdin, sys.stdout)


@dataclass
class Conversation:
    """The turns so far. The oldest are forgotten, a whole turn at a time, where they no longer fit the context."""

    talker: Talker
    system: str
    seed: int
    turns: list[tuple[str, str]] = field(default_factory=list)
    answered_tokens: int = 0
    dropped_turns: int = 0
    """How many turns the last answer had to do without."""
    _session: Session | None = None
    _asked: int = 0

    def reset(self) -> None:
        self.turns.clear()

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces of text. It joins the conversation when it ends or is closed half-way."""
        from anychip.serve.engine import Request

        engine, tokenizer = self.talker.engine, self.talker.tokenizer
        prompt = self._fit(question)
        request = Request(f"answer {self._asked}", prompt, self.talker.sampling, self.talker.stop_ids, self.seed)
        engine.check(request)
        self._session = self._session or engine.new_session()
        self._asked += 1
        self.answered_tokens = 0
        decoder, pieces = tokenizer.stream_decoder(), []
        try:
            for event in engine.stream(request, self._session):
                if event.token is not None:
                    self.answered_tokens += 1
                    pieces.append(decoder.feed(event.token))
                    yield pieces[-1]
            pieces.append(decoder.finish())
            yield pieces[-1]
        finally:
            self.turns.append((question, "".join(pieces)))

    def _fit(self, question: str) -> list[int]:
        """The prompt, without as many of the oldest turns as it takes to leave room for an answer."""
        context = self.talker.engine.context_length
        room = min(self.talker.sampling.max_new_tokens, context // 2)
        kept = list(self.turns)
        while True:
            prompt = self.talker.encode_messages(_messages(self.system, kept, question))
            if len(prompt) + room <= context or not kept:
                self.dropped_turns = len(self.turns) - len(kept)
                return prompt
            del kept[0]


def _messages(system: str, turns: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]


def _on_pipe(conversation: Conversation, questions: TextIO, answers: TextIO) -> None:
    for line in questions:
        if not (question := line.strip()):
            continue
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
            continue
        for piece in conversation.ask(question):
            answers.write(piece)
            answers.flush()
        answers.write("\n")
        answers.flush()


def _on_terminal(conversation: Conversation, name: str) -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()

    print(f"{name}\n{_DIM}{_HELP}{_PLAIN}")
    while (question := _read_question()) is not None:
        if question in ("/exit", "/quit"):
            return
        if question == "/reset":
            conversation.reset()
            print(f"{_DIM}The conversation starts anew.{_PLAIN}")
        elif question.startswith("/"):
            print(f"{_DIM}{_HELP}{_PLAIN}")
        elif question:
            _show_answer(conversation, question)


def _read_question() -> str | None:
    try:
        return input("\nyou > ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _show_answer(conversation: Conversation, question: str) -> None:
    try:
        answer = conversation.ask(question)
        started = time.perf_counter()
        print("bot > ", end="", flush=True)
        with _interruption() as interrupted:
            for piece in answer:
                print(piece, end="", flush=True)
                if interrupted:
                    answer.close()
                    break
    except InputError as error:  # a question that is too long ends itself, not the conversation
        print(error.paragraph)
        return
    seconds = time.perf_counter() - started
    notes = [f"{conversation.answered_tokens} tokens, {conversation.answered_tokens / seconds:.1f} tokens/s"]
    if interrupted:
        notes.append("interrupted")
    if conversation.dropped_turns:
        notes.append(f"without the oldest {conversation.dropped_turns} turns, which no longer fit the context")
    print(f"\n{_DIM}{'; '.join(notes)}{_PLAIN}")


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, so that an answer ends between two tokens. A second Ctrl-C ends the program."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
