"""Check nodes against the schema of their operator: inputs, outputs, attributes."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.protos import plain_domain
from cobla_onnx.text import quoted

__all__ = ["Schemas"]


class Schemas:
    """The operators that a graph may use, looked up once each.

    Parameters
    ----------
    imports : iterable of OperatorSetIdProto
    functions : collection of (str, str)
        Domains and names that the model defines itself: these are not looked up.
    inside_function : bool
        Whether attributes may stand for what a function is given.
    """

    def __init__(
        self,
        imports: Iterable[onnx.OperatorSetIdProto],
        functions: Collection[tuple[str, str]] = (),
        *,
        inside_function: bool = False,
    ) -> None:
        self._versions = {plain_domain(entry.domain): entry.version for entry in imports}
        self._functions = functions
        self._inside_function = inside_function
        self._found: dict[tuple[str, str], onnx.defs.OpSchema | None] = {}

    def _look_up(self, domain: str, name: str) -> onnx.defs.OpSchema | None:
        if (domain, name) not in self._found:
            schema = None
            if domain in self._versions and (domain, name) not in self._functions:
                try:
                    schema = onnx.defs.get_schema(name, self._versions[domain], domain)
                except onnx.defs.SchemaError:
                    # An operator that only the runtime knows: nothing to compare with.
                    schema = None
            self._found[domain, name] = schema
        return self._found[domain, name]

    def check(self, node: onnx.NodeProto, label: str) -> None:
        """Check a node against its operator's definition, if there is one.

        Raises
        ------
        ModelError
            If it has too few or too many inputs or outputs, or an attribute of another
            type than defined.
        """
        domain = plain_domain(node.domain)
        if not node.op_type:
            raise ModelError(f"{label}: has no operator; the file is damaged, export it again")
        if not domain and "" not in self._versions:
            raise ModelError(
                f"{label}: uses ONNX's own operators, whose version the model does not import; "
                "the file is damaged, export it again"
            )
        names = [attribute.name for attribute in node.attribute]
        if len(set(names)) < len(names):
            raise ModelError(f"{label}: has an attribute twice; the file is damaged")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.UNDEFINED:
                raise ModelError(
                    f"{label}: its attribute {quoted(attribute.name)} has no type; "
                    "the file is damaged, export it again"
                )
        if not self._inside_function and any(a.ref_attr_name for a in node.attribute):
            raise ModelError(
                f"{label}: an attribute refers to a function's, but it is in none; "
                "the file is damaged, export it again"
            )
        schema = self._look_up(domain, node.op_type)
        if schema is None:
            return
        for what, present, least, most in (
            ("inputs", node.input, schema.min_input, schema.max_input),
            ("outputs", node.output, schema.min_output, schema.max_output),
        ):
            if not least <= len(present) <= most:
                allowed = f"{least} or more" if most > 1000 else f"{least} to {most}"
                raise ModelError(
                    f"{label}: has {len(present)} {what}, {node.op_type} has {allowed}; "
                    "the file is damaged, export it again"
                )
        single = onnx.defs.OpSchema.FormalParameterOption.Single
        for formal, name in zip(schema.inputs, node.input, strict=False):
            if not name and formal.option == single:
                raise ModelError(
                    f"{label}: its input {quoted(formal.name)} is missing, which "
                    f"{node.op_type} needs; the file is damaged, export it again"
                )
        for attribute in node.attribute:
            defined = schema.attributes.get(attribute.name)
            if defined is not None and attribute.type != _code(defined.type):
                raise ModelError(
                    f"{label}: its attribute {quoted(attribute.name)} is not of the type that "
                    f"{node.op_type} defines; the file is damaged, export it again"
                )


def _code(kind: onnx.defs.OpSchema.AttrType) -> int:
    """Return the AttributeProto type of a schema's attribute type, by name: they share them."""
    return int(onnx.AttributeProto.AttributeType.Value(str(kind).rpartition(".")[2]))
