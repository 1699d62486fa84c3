"""Check an exported folder against its contract, and a request token by token against the inference client's.

rankllm-composer inspect --model FOLDER
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.errors import ModelError, PromptError, RecipeError, first_line
from rankllm_composer.escaping import for_screen
from rankllm_composer.export.model_card import serving_command
from rankllm_composer.prompts.chat import render_chat, template_notes
from rankllm_composer.prompts.client_names import describe_misread
from rankllm_composer.prompts.clients import CURRENT_CLIENT, ClientVersion, passage_word_limit
from rankllm_composer.prompts.contract import (
    CONTRACT_FILE,
    chat_template_sha256,
    count_bos,
    num_bos_tokens,
    read_contract,
)
from rankllm_composer.prompts.encoding import render_prompt
from rankllm_composer.prompts.identifier_tokens import identifier_token_ids, splits_after_bracket
from rankllm_composer.prompts.prompt_template import TEMPLATE_FILE, Prompt, read_prompt_template
from rankllm_composer.prompts.record import Record
from rankllm_composer.prompts.user_turn import SYSTEM_MESSAGE, clean_query, render_user_turn, truncate_passage
from rankllm_composer.prompts.windows import fit_window
from rankllm_composer.storage.content import check_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankllm_composer.prompts.contract import DecodingContract

# A request with brackets, mojibake and line breaks, which tokenizers and templates can treat differently.
QUERY = "who said [that] in cafÃ© no. 3?"
PASSAGES = ("see [12] and [a], 2 < 3", "cafÃ© â€œquotedâ€\x9d, \ufb01ne, 日本語 🙂", "  two\n\nlines ")
_COLORS = {"-": "\033[31m", "+": "\033[32m", " ": ""}
_PLAIN = "\033[0m"


def shown_token(token: str) -> str:
    """A token on one line of a terminal, with ↵ for a line break."""
    return for_screen(token.replace("\n", "↵").replace("Ċ", "↵").replace("<0x0A>", "↵"), one_line=True)


@dataclass(frozen=True, slots=True)
class RequestDiff:
    """A request as this package tokenizes it, and as the client's server does."""

    rows: tuple[tuple[str, str], ...]  # (mark, token): " " = both, "-" = only ours, "+" = only the client's

    @property
    def num_differences(self) -> int:
        return sum(mark != " " for mark, _ in self.rows)

    def lines(self, color: bool, width: int = 110) -> Iterator[str]:
        """Yield lines of about `width` characters, with ANSI colors or with marks around tokens of only one side."""
        ours, theirs = (sum(mark != other for mark, _ in self.rows) for other in "+-")
        verdict = f"{self.num_differences} differ" if self.num_differences else "identical"
        yield f"sample request: {ours} tokens here, {theirs} on the client's server, {verdict}"
        if self.num_differences:
            yield "⟨-only here⟩ ⟨+only the client's⟩"
        line: list[str] = []
        for mark, token in self.rows:
            text = shown_token(token)
            if mark != " ":
                text = f"{_COLORS[mark]}{text}{_PLAIN}" if color else f"⟨{mark}{text}⟩"
            line.append(text)
            if "↵" in text or sum(map(len, line)) + len(line) >= width:
                yield " ".join(line)
                line = []
        if line:
            yield " ".join(line)


@dataclass(frozen=True, slots=True)
class FolderInspection:
    """Result of checking an exported folder."""

    contract: DecodingContract
    request: RequestDiff | None  # None if the tokenizer cannot make one
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()  # what hinders the client, and `template_notes`

    def lines(self, color: bool) -> Iterator[str]:
        """Yield the lines to print, escaped for a terminal, with or without ANSI colors."""
        values: Mapping[str, Any] = {k: value for k, value in asdict(self.contract).items() if k != "template"}
        width = max(map(len, values))
        for name, value in values.items():
            text = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            yield f"{name:<{width}}  {for_screen(text, one_line=True)}"
        if self.request is not None:
            yield ""
            yield from self.request.lines(color)
            yield ""
        yield from (f"warning: {for_screen(text)}" for text in self.warnings)
        yield from (f"problem: {for_screen(text)}" for text in self.problems)


def client_prompt(system: str, user: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt text as the inference client renders it, with the system text always under the system role.

    Source:
        rank_llm 0.25.7 and 0.26.0: `RankListwiseOSLLM.create_prompt`,
        `SingleTurnListwiseInferenceHandler.generate_prompt`.
    """
    messages = [{"role": "system", "content": system}] if system else []
    return render_chat([*messages, {"role": "user", "content": user}], tokenizer)


def diff_request(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | None = None,
    client: ClientVersion = CURRENT_CLIENT,
    *,
    append_bracket: bool = False,
) -> RequestDiff:
    """Compare a sample request as `rerank` writes it with the client's.

    Args:
        prompt: as in `fit_window`.
        append_bracket: with the `[` that the client appends for first-token decoding.
    Raises:
        PromptError: the request cannot be encoded.
    """
    prompt = prompt or Prompt()
    ours = fit_window("sample", QUERY, PASSAGES, tokenizer, prompt=prompt, client=client).input_ids.tolist()
    limit = passage_word_limit(len(PASSAGES), client=client)
    user = prompt.user_turn(clean_query(QUERY), [truncate_passage(text, limit) for text in PASSAGES])
    text = client_prompt(prompt.system, user, tokenizer)
    theirs = tokenizer(text + "[" if append_bracket else text)["input_ids"]
    ours = ours if append_bracket else ours[:-1]
    rows: list[tuple[str, str]] = []
    for kind, i, j, k, m in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        mark = " " if kind == "equal" else "-"
        rows += [(mark, token) for token in tokenizer.convert_ids_to_tokens(ours[i:j])]
        if kind != "equal":
            rows += [("+", token) for token in tokenizer.convert_ids_to_tokens(theirs[k:m])]
    return RequestDiff(tuple(rows))


def serving_differences(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Describe in sentences how the inference client's prompt differs from the one that is trained."""
    from ftfy import fix_text

    where = f"tokenizer {tokenizer.name_or_path}: chat template"
    system, user = record.prompt_turns
    try:
        theirs = client_prompt(system, user, tokenizer)
        served = client_prompt(SYSTEM_MESSAGE if record.template is None else system, user, tokenizer)
    except PromptError as error:
        return [
            f"{where} fails on the system role ({first_line(error.__cause__)}), which the inference client sends. Use "
            "a template that writes the system text, such as one that puts it before the user turn."
        ]
    if fix_text(system).strip() not in theirs:
        return [
            f"{where} omits the system turn, so the client would lose the system text that training puts before the "
            "user turn. Use a template that writes it."
        ]
    num_ours, num_theirs = (
        count_bos(tokenizer(text)["input_ids"], tokenizer) for text in (render_prompt(record, tokenizer), served)
    )
    if num_ours != num_theirs:
        return [
            f"{where} writes {num_ours} beginning-of-sequence tokens before this record, but {num_theirs} before the "
            "inference client's prompts. Remove them from the record's text, or use a template that always writes the "
            "same number."
        ]
    return []


def inspect_folder(folder: str | Path, *, trust_remote_code: bool = False) -> FolderInspection:
    """Check an exported folder against its decoding contract, and a request against the client's.

    Raises:
        ModelError: the contract, the tokenizer or the configuration is missing or cannot be read.
    """
    from transformers import AutoConfig

    from rankllm_composer.model.loading import load_tokenizer
    from rankllm_composer.model.lora import base_of_adapter, is_adapter
    from rankllm_composer.model.remote_code import code_refused
    from rankllm_composer.options import ModelOptions

    contract = read_contract(folder)
    with code_refused(str(folder)):
        tokenizer = load_tokenizer(ModelOptions(name_or_path=str(folder), trust_remote_code=trust_remote_code))
        try:
            configured = base_of_adapter(folder) if is_adapter(folder) else folder
            config = AutoConfig.from_pretrained(configured, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{folder}: the configuration cannot be read ({first_line(error)}). Export the model again."
            ) from error
    problems: list[str] = []
    request: RequestDiff | None = None
    try:
        check_content(folder)
    except ModelError as error:
        problems.append(str(error))

    def compare(key: str, expected: Any, actual: Any, remedy: str) -> None:
        if expected != actual:
            problems.append(
                f"{Path(folder, CONTRACT_FILE)}: {key} is {expected}, but the folder has {actual}. {remedy}"
            )

    if contract.template is not None:
        try:
            served = asdict(read_prompt_template(Path(folder, TEMPLATE_FILE)))
            for name, text in asdict(contract.template).items():
                again = f"Restore {TEMPLATE_FILE}, or export the model again."
                compare(f"template.{name}", repr(text), repr(served[name]), again)
        except RecipeError as error:
            problems.append(str(error))
    if tokenizer.chat_template:
        again = "Restore the tokenizer's files, or export the model again."
        compare("chat_template_sha256", contract.chat_template_sha256, chat_template_sha256(tokenizer), again)
        compare("num_bos", contract.num_bos, num_bos_tokens(tokenizer), again)
        if contract.identifier_token_ids is not None:
            try:
                known = (tokenizer, len(contract.identifiers), contract.identifier_style)
                found = identifier_token_ids(*known, contract.objective)
                compare("identifier_token_ids", contract.identifier_token_ids, found, again)
                compare("bracket_merges", contract.bracket_merges, splits_after_bracket(*known), again)
            except PromptError as error:
                problems.append(str(error))
        turn = render_user_turn("query", ["passage"], contract.identifier_style)
        sample = Record("sample", SYSTEM_MESSAGE, turn, "[A]", template=contract.template)
        problems += serving_differences(sample, tokenizer)
        if not any("fails on the system role" in text for text in problems):
            appends = contract.client.appends_bracket and contract.served_decoding() == "first_token"
            request = diff_request(tokenizer, contract.prompt, contract.client_version, append_bracket=appends)
            if request.num_differences and not problems:
                problems.append(
                    f"{folder}: {request.num_differences} tokens of a request differ from the client's, see above. "
                    "Restore the tokenizer's files, or train with this tokenizer."
                )
    else:
        problems.append(
            f"{folder}: the tokenizer has no chat template; the contract's has the "
            f"hash {contract.chat_template_sha256[:12]}…. Restore chat_template.jinja or tokenizer_config.json."
        )
    if contract.objective != "ranking" and tokenizer.eos_token_id not in contract.eos_token_ids:
        compare("eos_token_ids", contract.eos_token_ids, (tokenizer.eos_token_id,), "Set tokenizer.eos_token.")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and contract.context_size_tokens > positions:
        compare("context_size_tokens", contract.context_size_tokens, positions, "Lower it to the model's limit.")
    if len(tokenizer) > config.vocab_size:
        problems.append(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens but the model only {config.vocab_size:,}. Restore "
            "the tokenizer's files."
        )
    notes = list(_client_notes(folder, contract))
    if request is not None:
        notes += template_notes(tokenizer)
    return FolderInspection(contract, request, tuple(problems), tuple(notes))


def _client_notes(folder: str | Path, contract: DecodingContract) -> Iterator[str]:
    """What keeps the contract's version of the client from serving the folder as it was trained, and another one."""
    version = contract.client_version
    misread = describe_misread(folder, version)
    if misread is not None:
        yield misread
    if contract.served_decoding() is None:
        yield f"rank_llm {version} cannot serve it: {'; '.join(contract.unserved().values())}. Use `rerank`."
    difference = contract.unserved_words()
    if difference is not None:
        yield f"{difference}. Use `rerank`, or train with data.client_version={CURRENT_CLIENT}."
    if version != CURRENT_CLIENT:
        current = contract.with_client(CURRENT_CLIENT)
        if current.served_decoding() is not None:
            command = serving_command(current, str(folder)).replace(" \\\n   ", "")
            yield f"made for rank_llm {version}; {CURRENT_CLIENT} shows the same prompts in full windows by: {command}"
