"""Jinja environment of all HTML pages, which extend base.html.j2."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from sparsify.reporting.numbers import count, percent

BASE_PACKAGE = "sparsify.reporting"


def page_environment(package: str) -> Environment:
    """An environment with the templates of a package and base.html.j2."""
    packages = dict.fromkeys((package, BASE_PACKAGE))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count}
    return environment
