"""The OpenAPI document of the REST API, made from the descriptor set by which the gateway transcodes.

Everything in it is said in the protos: http rules, request rules, permissions, statuses and comments. So it cannot
tell of a route that the gateway does not have. `python -m gateway` writes it where Envoy serves it, at GET /api.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, NamedTuple

from google.api import annotations_pb2
from google.protobuf import descriptor_pb2 as pb

from buf.validate import validate_pb2
from esd.options.v1 import options_pb2

Json = dict[str, Any]
Field = pb.FieldDescriptorProto

VERSION = "1.5.0"
_SCALARS: dict[int, Json] = {
    Field.TYPE_STRING: {"type": "string"},
    Field.TYPE_BYTES: {"type": "string", "format": "byte"},
    Field.TYPE_ENUM: {"type": "string"},
    Field.TYPE_BOOL: {"type": "boolean"},
    Field.TYPE_INT32: {"type": "integer", "format": "int32"},
    Field.TYPE_INT64: {"type": "string", "format": "int64"},
    Field.TYPE_FLOAT: {"type": "number"},
    Field.TYPE_DOUBLE: {"type": "number"},
}
_FREE: dict[str, Json] = {
    ".google.protobuf.Struct": {"type": "object"},
    ".google.protobuf.ListValue": {"type": "array", "items": {}},
    ".google.protobuf.Value": {},
}
_RULES = {
    "min_len": "minLength",
    "max_len": "maxLength",
    "pattern": "pattern",
    "gte": "minimum",
    "lte": "maximum",
    "min_items": "minItems",
    "max_items": "maxItems",
}
_ERROR: Json = {
    "description": "The envelope of every error; the message is one sentence for the caller.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["statusCode", "message"],
                "properties": {"statusCode": {"type": "integer"}, "message": {"type": "string"}},
            }
        }
    },
}
_USERNAME: Json = {
    "name": "username",
    "in": "header",
    "description": "The acting user; absent, the owner of the key. Naming another needs an impersonating key.",
    "schema": {"type": "string"},
}
_IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Within 24 hours the same request under the same key has the same answer, and is done once.",
    "schema": {"type": "string", "maxLength": 255},
}


class _Route(NamedTuple):
    """One RPC with its http rule; `name` is its full name, by which its comment is found."""

    name: str
    tag: str
    method: pb.MethodDescriptorProto
    verb: str
    path: str
    body: str


def openapi(descriptor_set: bytes, server: str = "/") -> Json:
    """The document. `descriptor_set` is a FileDescriptorSet with comments, `server` what stands before the paths."""
    return _Document(pb.FileDescriptorSet.FromString(descriptor_set)).render(server)


class _Document:
    """The messages and comments by name, while the document is made."""

    def __init__(self, files: pb.FileDescriptorSet) -> None:
        self._files = [file for file in files.file if file.name.startswith("esd/")]
        self._comments: dict[str, str] = {}
        self._messages: dict[str, pb.DescriptorProto] = {}
        self._schemas: Json = {}
        for file in self._files:
            for message in file.message_type:
                self._keep(f".{file.package}.{message.name}", message)
            for location in file.source_code_info.location:
                if location.leading_comments and (name := _name_at(file, list(location.path))):
                    self._comments[name] = " ".join(location.leading_comments.split())

    def render(self, server: str) -> Json:
        """The whole document."""
        paths: Json = {}
        for route in sorted(self._routes(), key=lambda route: (route.path, route.verb)):
            paths.setdefault(route.path, {})[route.verb] = self._operation(route)
        return {
            "openapi": "3.1.0",
            "info": {"title": "Extension for Stable Diffusion", "version": VERSION},
            "servers": [{"url": server}],
            "security": [{"key": []}],
            "paths": paths,
            "components": {
                "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "x-api-key"}},
                "responses": {"Error": _ERROR},
                "schemas": dict(sorted(self._schemas.items())),
            },
        }

    def _keep(self, name: str, message: pb.DescriptorProto) -> None:
        self._messages[name] = message
        for nested in message.nested_type:
            self._keep(f"{name}.{nested.name}", nested)

    def _routes(self) -> Iterator[_Route]:
        for file in self._files:
            for service in file.service:
                for method in service.method:
                    rule = method.options.Extensions[annotations_pb2.http]
                    if verb := rule.WhichOneof("pattern"):
                        name = f".{file.package}.{service.name}.{method.name}"
                        yield _Route(name, file.package.split(".")[1], method, verb, getattr(rule, verb), rule.body)

    def _operation(self, route: _Route) -> Json:
        extensions: Any = route.method.options.Extensions
        permissions = list(extensions[options_pb2.permission])
        request = self._messages[route.method.input_type]
        in_path = re.findall(r"{(\w+)}", route.path)
        operation: Json = {
            "operationId": route.method.name,
            "tags": [route.tag],
            "description": self._comments.get(route.name, ""),
            "parameters": [self._parameter(route, field, in_path) for field in self._parameters(route, request)],
            "responses": self._responses(route),
        }
        if permissions:
            operation["description"] += f" The acting user needs {' or '.join(permissions)}."
            operation["x-permissions"] = permissions
            operation["parameters"].append(_USERNAME)
        if extensions[options_pb2.idempotency_key]:
            operation["parameters"].append(_IDEMPOTENCY_KEY)
        if route.body:
            body = next((field for field in request.field if field.name == route.body), None)
            schema = self._reference(route.method.input_type) if body is None else self._value(body)
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        return operation

    def _parameters(self, route: _Route, request: pb.DescriptorProto) -> list[Field]:
        """The fields of the request that do not come with the body."""
        in_path = re.findall(r"{(\w+)}", route.path)
        return [
            field for field in request.field if field.name in in_path or (not route.body and field.name != route.body)
        ]

    def _parameter(self, route: _Route, field: Field, in_path: list[str]) -> Json:
        place = {"name": field.name, "in": "path", "required": True}
        if field.name not in in_path:
            place = {"name": field.json_name, "in": "query", "required": _rules(field).required}
        return place | {"description": self._comment(route.method.input_type, field), "schema": self._schema(field)}

    def _responses(self, route: _Route) -> Json:
        extensions: Any = route.method.options.Extensions
        replies = [extensions[options_pb2.reply], *extensions[options_pb2.other_reply]]
        errors = {"4XX": {"$ref": "#/components/responses/Error"}, "5XX": {"$ref": "#/components/responses/Error"}}
        return {str(reply.status or 200): self._response(route, reply) for reply in replies} | errors

    def _response(self, route: _Route, reply: options_pb2.Reply) -> Json:
        status = reply.status or 200
        response: Json = {"description": reply.message or HTTPStatus(status).phrase}
        if status == HTTPStatus.NO_CONTENT:
            return response
        bare = reply.raw or route.method.server_streaming
        schema = self._reference(route.method.output_type) if bare else self._envelope(route)
        kind = "text/event-stream" if route.method.server_streaming else "application/json"
        return response | {"content": {kind: {"schema": schema}}}

    def _envelope(self, route: _Route) -> Json:
        properties: Json = {"statusCode": {"type": "integer"}, "message": {"type": "string"}}
        response = self._messages[route.method.output_type]
        whole = next((field for field in response.field if field.name == "data"), None)
        if response.field:
            properties["data"] = self._schema(whole) if whole else self._reference(route.method.output_type)
        return {"type": "object", "required": ["statusCode"], "properties": properties}

    def _reference(self, name: str) -> Json:
        """A reference to a message's schema, which is made at its first use."""
        short = name.split(".v1.")[1]
        if short not in self._schemas:
            self._schemas[short] = {}  # a message that holds itself finds it begun
            self._schemas[short] = self._object(name)
        return {"$ref": f"#/components/schemas/{short}"}

    def _object(self, name: str) -> Json:
        message = self._messages[name]
        schema: Json = {"type": "object", "description": self._comments.get(name, ""), "properties": {}}
        for field in message.field:
            schema["properties"][field.json_name] = self._schema(field) | {"description": self._comment(name, field)}
        if required := [field.json_name for field in message.field if _rules(field).required]:
            schema["required"] = required
        return schema

    def _comment(self, message: str, field: Field) -> str:
        return self._comments.get(f"{message}.{field.name}", "")

    def _schema(self, field: Field) -> Json:
        """The schema of a field as a whole: a list, a map or one value."""
        rules = _rules(field)
        if field.label != Field.LABEL_REPEATED:
            return self._value(field) | _bounds(rules)
        entry = self._messages.get(field.type_name)
        if entry is not None and entry.options.map_entry:
            value = self._value(entry.field[1]) | _bounds(rules.map.values)
            return {"type": "object", "additionalProperties": value}
        bounds = _named(rules.repeated)
        return {"type": "array", "items": self._value(field) | _bounds(rules.repeated.items), **bounds}

    def _value(self, field: Field) -> Json:
        if field.type_name in _FREE:
            return dict(_FREE[field.type_name])
        if field.type == Field.TYPE_MESSAGE:
            return self._reference(field.type_name)
        return dict(_SCALARS[field.type])


def _rules(field: Field) -> Any:
    extensions: Any = field.options.Extensions
    return extensions[validate_pb2.field]


def _bounds(rules: Any) -> Json:
    """The rules of one value in JSON Schema's words."""
    kind = rules.WhichOneof("type")
    if kind not in {"string", "int32"}:
        return {}
    given = getattr(rules, kind)
    bounds = _named(given)
    if allowed := list(getattr(given, "in")):
        bounds["enum"] = allowed
    if kind == "string" and given.WhichOneof("well_known") == "uuid":
        bounds["format"] = "uuid"
    return bounds


def _named(rules: Any) -> Json:
    set_here = {descriptor.name for descriptor, _ in rules.ListFields()}
    return {word: getattr(rules, name) for name, word in _RULES.items() if name in set_here}


def _name_at(file: pb.FileDescriptorProto, path: list[int]) -> str:
    """The full name of what a comment stands at; empty where that is no part of the document."""
    named = {"message_type", "nested_type", "field", "service", "method"}
    here: Any = file
    names = [f".{file.package}"]
    while path:
        if len(path) < 2:
            return ""
        number, index, *path = path
        descriptor = here.DESCRIPTOR.fields_by_number[number]
        if descriptor.name not in named:
            return ""
        here = getattr(here, descriptor.name)[index]
        names.append(here.name)
    return ".".join(names)
