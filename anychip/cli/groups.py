"""A group of verbs, one of which is meant when none is named: `plan RECIPE` is `plan layouts RECIPE`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class DefaultCommandGroup(TyperGroup):
    """Hands words that name no verb of the group to its default verb."""

    default: str

    @classmethod
    def of(cls, verb: str) -> type[DefaultCommandGroup]:
        return type(cls.__name__, (cls,), {"default": verb})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [self.default, *args]
        return super().parse_args(ctx, args)
