"""The page `/docs`: the service's operations, from its OpenAPI document. It loads nothing, scripts included."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title></head><body><main>
<h1>{title}</h1>
<p>{summary} The document for programs is <a href="/openapi.json">/openapi.json</a>.</p>
"""


def add_reference(app: FastAPI) -> None:
    """Adds the page."""

    @app.get("/docs", include_in_schema=False)
    async def reference() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))


def reference_page(document: Mapping[str, Any]) -> str:
    """Returns an OpenAPI document as HTML.

    Args:
        document: The document.
    """
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    parts = [_HEAD.format(title=escape(title), summary=escape(info.get("summary", "")))]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(f"{method.upper()} {path}", operation))
    parts.append("<h2>Schemas</h2>\n")
    parts += [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    return "".join([*parts, "</main></body></html>\n"])


def _operation(name: str, operation: Mapping[str, Any]) -> str:
    """Returns an operation with its parameters, its body and its answer."""
    rows = [
        (entry["name"], f"{entry['in']}, {_kind(entry['schema'])}", entry.get("description", ""), entry.get("required"))
        for entry in operation.get("parameters", ())
    ]
    body = operation.get("requestBody", {}).get("content", {})
    rows += [("body", _kind(media["schema"]), "", True) for media in body.values()]
    answer = operation["responses"]["200"]
    rows += [("answer", _kind(media.get("schema", {})), "", False) for media in answer["content"].values()]
    return f"<h2><code>{escape(name)}</code></h2>\n<p>{escape(operation.get('description', ''))}</p>\n{_table(rows)}"


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    """Returns a schema with its properties."""
    needed = schema.get("required", ())
    rows = [
        (key, _kind(value), value.get("description", ""), key in needed)
        for key, value in schema.get("properties", {}).items()
    ]
    return (
        f'<h3 id="{escape(name)}">{escape(name)}</h3>\n<p>{escape(schema.get("description", ""))}</p>\n{_table(rows)}'
    )


def _table(rows: list[tuple[str, str, str, Any]]) -> str:
    """Returns rows of a name, a type as HTML, a description, and whether it is needed."""
    lines = [
        f"<tr><th><code>{escape(name)}</code></th><td>{kind}</td>"
        f"<td>{'<strong>needed</strong> ' if needed else ''}{escape(text)}</td></tr>\n"
        for name, kind, text, needed in rows
    ]
    return f"<table>\n{''.join(lines)}</table>\n" if lines else ""


def _kind(schema: Mapping[str, Any]) -> str:
    """Returns a schema's type as HTML, with links to the schemas that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_kind(part) for part in schema[several]))
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return escape(" or ".join(kind) if isinstance(kind, list) else kind)
