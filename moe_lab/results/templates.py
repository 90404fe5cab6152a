"""The files beside the code that pages are made from (`*.jinja`): a name that is missing is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(package: str, *, html: bool = True) -> Environment:
    """For the templates of a package, such as `moe_lab.results`. With `html`, values are escaped."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
