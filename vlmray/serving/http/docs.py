"""The page at `/docs`: what the OpenAPI document says, as plain HTML that needs no other machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>vlmray: its HTTP API</title>
<link rel="icon" href="data:,"><style>:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
table { border-collapse: collapse } td { padding: .15rem 1rem .15rem 0; vertical-align: top }
section { overflow-x: auto }</style></head><body>"""


def render_docs(document: Mapping[str, Any]) -> str:
    """Write an OpenAPI document as a page."""
    info = document["info"]
    parts = [_HEAD, f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"]
    parts.append(f"<p>{escape(info['description'])} <a href='openapi.json'>openapi.json</a></p>")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(f"{method.upper()} {path}", operation)
    for name, schema in document["components"]["schemas"].items():
        parts += _schema(name, schema)
    return "\n".join([*parts, "</body></html>"])


def _operation(title: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<section><h2><code>{escape(title)}</code></h2><p>{escape(operation.get('description', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if content:
        yield f"<p>It takes {_type(content['schema'])}.</p>"
    rows = [(status, escape(each["description"])) for status, each in operation["responses"].items()]
    yield _table(rows) + "</section>"


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    title, text = escape(name), escape(schema.get("description", ""))
    yield f"<section><h2 id='{title}'>{title}</h2><p>{text}</p>"
    fields = schema.get("properties", {}).items()
    rows = [
        (f"<code>{escape(field)}</code>", _type(kind), escape(kind.get("description", "")))
        for field, kind in fields
    ]
    yield _table(rows) + "</section>"


def _type(schema: Mapping[str, Any]) -> str:
    """Name a type in HTML; one of the document's own with a link."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(map(_type, schema[union]))
    if "const" in schema or "enum" in schema:
        return escape(", ".join(map(repr, schema.get("enum", [schema.get("const")]))))
    items = f" of {_type(schema['items'])}" if "items" in schema else ""
    return escape(schema.get("type", "anything")) + items


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
