"""What tells the templates apart, as data. Sources: the chat() of TeleChat2-115B (A); the template that TeleChat2's
prediction scripts carry (B); the template of T1 (C); of TeleChat3 (D) and of TeleChat3-Coder (E)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from anychip.recipe.schema import ChatTemplate

Template = ChatTemplate
TEMPLATES: tuple[Template, ...] = get_args(Template)

IDENTITY = (
    "你是中国电信星辰语义大模型，英文名是TeleChat，"
    "你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的人工智能助手。"
)
_JSON_CALLS = (
    "\n\n# 可用工具\n你可以调用<tools></tools>标签中包含的一个或多个工具来辅助你回答问题,"
    "以下是可用工具详情：\n<tools>\n",
    "\n</tools>\n\n# 调用方法\n你需要遵循工具的要求，使用json格式返回工具名称及参数，"
    "并用<tool_call></tool_call>包含。下方是一个调用模板：\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n',
)
_XML_CALLS = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n",
    "\n</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<param_key>{param-key-1}</param_key><param_value>{param-value-1}</param_value>"
    "<param_key>{param-key-2}</param_key><param_value>{param-value-2}</param_value>...</tool_call>",
)


@dataclass(frozen=True)
class Style:
    """`system`: no system role at all; only where there is a system message; or its marker always.

    `after_system` and `after_answer` follow the system text and the `<_end>` of an answer that is not the last part.
    `tools`: what stands around the list of tools, which is followed by nothing else.
    `think`: what follows `<think>` in the prompt for an answer; None: the generation does not think.
    `after_think` stands between `</think>` and the answer. `closes_think`: an answer without thinking begins with
    `</think>`. `keeps`: which answers keep their thinking, the last message alone or all behind the last question.
    `results`: the marker of a tool's result; `result_break` stands around its text.
    """

    system: Literal["none", "given", "always"]
    starts: bool = False
    after_system: str = "\n"
    after_answer: str = "\n"
    identity: str = ""
    tools: tuple[str, str] | None = _JSON_CALLS
    calls: Literal["json", "xml"] = "json"
    think: str | None = None
    after_think: str = "\n"
    closes_think: bool = False
    keeps: Literal["last", "behind_question"] = "last"
    results: str = "<_user>"
    result_break: str = "\n"


STYLES: dict[Template, Style] = {
    "A": Style("none", starts=True, after_answer="", tools=None),
    "B": Style("given", identity=IDENTITY),
    "C": Style("given", identity=IDENTITY, think="\n"),
    "D": Style("always", think="\n"),
    "E": Style(
        "always",
        after_system="",
        after_answer="",
        tools=_XML_CALLS,
        calls="xml",
        think="",
        after_think="",
        closes_think=True,
        keeps="behind_question",
        results="<_observation>",
        result_break="",
    ),
}
