"""Griffe extension: options in the reference of the Python API, which `compressor.options` derives from fields.

Griffe reads the source text, where the docstring of a settings class lists no options and the functions take settings.
This extension imports these objects and takes their docstrings and parameters.
"""

import inspect

import griffe

DOCUMENTED = "compressor.options.documented"
TAKES_FIELDS = "compressor.options.takes_fields"


class DerivedOptions(griffe.Extension):
    """Complete decorated classes and functions from the imported objects."""

    def on_class(self, *, cls, **_):
        """Replace the docstring of a settings class."""
        if _is_decorated(cls, DOCUMENTED):
            cls.docstring.value = inspect.cleandoc(griffe.dynamic_import(cls.path).__doc__)

    def on_function(self, *, func, **_):
        """Replace the settings that a function takes by their fields."""
        if _is_decorated(func, TAKES_FIELDS):
            parameters = inspect.signature(griffe.dynamic_import(func.path)).parameters.values()
            func.parameters = griffe.Parameters(*map(_parameter, parameters))


def _is_decorated(item, decorator):
    return any(each.callable_path == decorator for each in item.decorators)


def _parameter(parameter):
    default = None if parameter.default is parameter.empty else repr(parameter.default)
    kind = griffe.ParameterKind[parameter.kind.name.lower()]
    return griffe.Parameter(parameter.name, annotation=parameter.annotation, kind=kind, default=default)
