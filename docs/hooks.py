"""What MkDocs calls as it builds the site: it adds the pages beside the code, and a reference page for every room."""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import wanda_lightning

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "wanda_lightning"
BESIDE_THE_CODE = {
    "architecture.md": "wanda_lightning/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "examples.md": "examples/README.md",
    "recipes.md": "wanda_lightning/recipes/README.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def rooms() -> dict[str, list[str]]:
    """Return the modules of every room of the package; a room is a folder, or a file that has no folder."""
    modules: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in ("__init__", "__main__"):
            modules.setdefault(parts[1], []).append(".".join(parts).removesuffix(".__init__"))
    return modules


def reference(room: str, modules: list[str]) -> str:
    """Write the page of a room: its README, its public names, then everything in its modules."""
    public = [name for name, home in wanda_lightning._HOME.items() if home.partition(".")[0] == room]
    readme = PACKAGE / room / "README.md"
    page = [readme.read_text(encoding="utf-8") if readme.exists() else f"# {room}\n"]
    page += [f"::: wanda_lightning.{name}\n" for name in public]
    filters = ["!^_", *(f"!^{name}$" for name in public)]
    page += [f"::: {module}\n    options: {{filters: {filters}}}\n" for module in modules]
    return "\n".join(page)


def source_of(page: str) -> str:
    """Return the file of the repository that a page of the site is made of."""
    beside = page.replace("reference/", "wanda_lightning/").replace(".md", "/README.md")
    return BESIDE_THE_CODE.get(page) or (beside if page.startswith("reference/") else f"docs/{page}")


def page_of(source: str) -> str:
    """Return the page of the site that shows a file of the repository."""
    for page, beside in BESIDE_THE_CODE.items():
        if source == beside:
            return page
    folder, _, rest = source.partition("/")
    if folder == "examples":  # all on one page; a notebook is the Python file it is made of
        return f"examples.md#{rest.replace('.ipynb', '.py').replace('.', '')}"
    return f"reference/{rest.partition('/')[0].removesuffix('.py')}.md" if folder == "wanda_lightning" else rest


def on_config(config: MkDocsConfig) -> None:
    """List the reference in the navigation."""
    assert config.nav is not None
    config.nav.append({"Reference": [f"reference/{room}.md" for room in rooms()]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that docs/ does not hold."""
    for page, source in BESIDE_THE_CODE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for room, modules in rooms().items():
        files.append(File.generated(config, f"reference/{room}.md", content=reference(room, modules)))


def examples() -> str:
    """Write the examples out, each under its name."""
    languages = {".py": "python", ".sbatch": "bash"}
    files = [file for file in sorted((ROOT / "examples").iterdir()) if file.suffix in languages]
    return "".join(
        f"\n## {file.name}\n\n```{languages[file.suffix]}\n{file.read_text(encoding='utf-8')}```\n" for file in files
    )


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn links between files of the repository, as a forge follows them, into links between pages."""
    here = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        target = normpath(join(dirname(source_of(here)), match[1]))
        return relpath(page_of(target), dirname(here) or ".")

    return LINK.sub(link, markdown) + (examples() if here == "examples.md" else "")
