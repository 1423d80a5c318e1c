"""The rules that the protos keep (style.md, "Protos"), so that a new RPC cannot forget one."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto

from esd.options.v1 import options_pb2
from tests.protos import ROOT, commented_things, descriptor_set, methods, route

METHODS = list(methods())
FILES = list(descriptor_set().file)
EXT_AUTHZ = "esd/identity/v1/ext_authz.proto"
# Envoy's and KEDA's messages, whose packages and names are theirs.
FOREIGN = (EXT_AUTHZ, "esd/inference/v1/externalscaler.proto")

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def lower_camel(name: str) -> str:
    """The JSON name that protobuf gives a field by itself."""
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)


@every_method
def test_every_rpc_says_who_may_call_it(method: MethodDescriptor) -> None:
    options: Any = method.GetOptions()
    permissions = options.Extensions[options_pb2.permission]
    caller = options.Extensions[options_pb2.caller]
    doors = [bool(permissions), bool(caller), options.Extensions[options_pb2.public]]
    assert doors.count(True) == 1
    assert all(re.fullmatch(r"[a-z_]+:[a-z]+", permission) for permission in permissions)


@every_method
def test_every_rest_route_is_for_users(method: MethodDescriptor) -> None:
    options: Any = method.GetOptions()
    if route(method):
        by_permission = bool(options.Extensions[options_pb2.permission])
        assert by_permission or options.Extensions[options_pb2.caller] == options_pb2.CALLER_KEY


@every_method
def test_every_rpc_has_request_and_response_of_its_own(method: MethodDescriptor) -> None:
    if method.containing_service.file.name in FOREIGN:
        return
    assert (method.input_type.name, method.output_type.name) == (f"{method.name}Request", f"{method.name}Response")


@every_method
def test_a_body_never_contradicts_the_path(method: MethodDescriptor) -> None:
    rest = route(method)
    if rest is None:
        return
    variables = re.findall(r"{(\w+)}", rest.path)
    assert all(variable in method.input_type.fields_by_name for variable in variables)
    assert rest.body != "*" or not variables, 'the gateway refuses a body that repeats a path variable: body: "body"'
    assert rest.body in ("", "*") or rest.body in method.input_type.fields_by_name
    assert rest.verb != "GET" or not rest.body


@every_method
def test_a_reply_belongs_to_a_rest_route(method: MethodDescriptor) -> None:
    options: Any = method.GetOptions()
    if options.HasExtension(options_pb2.reply):
        reply = options.Extensions[options_pb2.reply]
        assert route(method) is not None
        assert all(status == 0 or 200 <= status < 300 for status in (reply.status, reply.webui_status))


def test_no_two_rpcs_share_a_route() -> None:
    routes = Counter((rest.verb, rest.path) for method in METHODS if (rest := route(method)))
    assert [where for where, count in routes.items() if count > 1] == []


@every_file
def test_everything_has_a_comment_that_begins_with_its_name(file: FileDescriptorProto) -> None:
    bare = [name for name, comment in commented_things(file) if not comment]
    assert bare == []
    if file.name != EXT_AUTHZ:
        elsewhere = [
            name for name, comment in commented_things(file) if not comment.startswith(name.rsplit(".", 1)[-1])
        ]
        assert elsewhere == []


@every_file
def test_json_names_stand_only_where_the_legacy_spelling_differs(file: FileDescriptorProto) -> None:
    text = re.sub(r"//[^\n]*", "", (ROOT / "protos" / file.name).read_text())
    named = re.findall(r"(\w+) = \d+ \[\s*(?:[^\]]*?\s)?json_name = \"([^\"]+)\"", text)
    assert [field for field, json_name in named if lower_camel(field) == json_name] == []
    assert len(named) == text.count("json_name")


@every_file
def test_names_follow_the_field(file: FileDescriptorProto) -> None:
    for message in _messages(file):
        assert re.fullmatch(r"[A-Z][A-Za-z0-9]*", message.name)
        assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name) for field in message.field)
    if file.name in FOREIGN:
        return
    assert file.name.rsplit("/", 1)[0] == file.package.replace(".", "/")
    for enum in file.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert enum.value[0].name == f"{prefix}_UNSPECIFIED"
        assert all(value.name.startswith(prefix + "_") for value in enum.value)
    assert all(service.name.endswith("Service") for service in file.service)


def _messages(file: FileDescriptorProto) -> list[DescriptorProto]:
    waiting, found = list(file.message_type), list[DescriptorProto]()
    while waiting:
        message = waiting.pop()
        if not message.options.map_entry:
            found.append(message)
        waiting.extend(message.nested_type)
    return found
