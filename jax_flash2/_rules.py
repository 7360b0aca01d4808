"""The primitives' own derivatives: JVP rules and transposes, closed up to second order.

With F(x) the forward's output and logsumexp, x all operands that have a gradient, J its
derivative and D^2 its second, the passes are

  forward   F(x)                    tangent   T(x; t)    = J(x) t
  backward  B(x; g) = J(x)^T g      tangent2  W(x; t, u) = D^2 F(x)[t, u]
  second    S(x; t, g, h) = d/dx <g, J(x) t> + B(x; h)

and every derivative of one is another, because second derivatives are symmetric:

  along x in direction u:  F -> T(x; u)      T -> W(x; t, u)      B -> S(x; u, g, 0)
  transposed:              T in t -> B       B in g -> T          S in h -> T
                           W in u -> S       S in t -> S          S in g -> W

In their other arguments all are linear. W and S along x would be of third order.

B, T, W and S also take F(x), and W and S its tangents along t and u, as residuals that
save a pass. These are functions of x and t: each pass accounts for the whole dependence
on its arguments, so derivatives with respect to the residuals are *not* added. Their
tangents are what the next pass takes as its residuals.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from jax_flash2 import _compat
from jax_flash2._maps import (
    At,
    cotangents_of,
    direction_of,
    like,
    operands_of,
    prefixed,
)
from jax_flash2._passes import Named
from jax_flash2._primitives import (
    backward_p,
    forward_p,
    second_p,
    split_named,
    tangent2_p,
    tangent_p,
)
from jax_flash2._spec import DIFFERENTIABLE


def _open(values: Any, params: dict[str, Any]) -> tuple[Named, At]:
    """The arrays of a bind by name, and the point it is at."""
    arrays = dict(zip(params["present"], values, strict=True))
    x, rows = split_named(arrays)
    point = {name: a for name, a in x._asdict().items() if a is not None}
    point |= {name: rows[name] for name in ("out", "lse") if name in rows}
    return arrays, At(point, params["spec"], params["mapped"])


def _changes(tangents: Any, params: dict[str, Any]) -> Named:
    """The tangents that are not symbolic zeros, by name."""
    named = zip(params["present"], tangents, strict=True)
    return {
        n: t
        for n, t in named
        if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0
    }


def _no_third_order(changes: Named) -> None:
    if any(name in DIFFERENTIABLE for name in changes):
        raise NotImplementedError(
            "flash_attention: derivatives of third and higher order are not available; "
            "implementation='reference' has them, in memory quadratic in the length"
        )


def _sum(*terms: Any) -> Any:
    """The sum of tuples of arrays, one or more."""
    return [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


# -------------------------------------------------------------------------- JVP rules


def _forward_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    out, lse, *largest = forward_p.bind(*primals, **params)
    # Here, where they become residuals, and not where the call returns them.
    out, lse = checkpoint_name(out, "flash2_out"), checkpoint_name(lse, "flash2_lse")
    arrays, at = _open(primals, params)
    at = at._replace(arrays=arrays | {"out": out, "lse": lse})
    t = operands_of(_changes(tangents, params))
    dots = at.tangent(t) if t else [_compat.zero_tangent(a) for a in (out, lse)]
    zeros = [_compat.zero_tangent(a) for a in largest]
    return [out, lse, *largest], [*dots, *zeros]


def _tangent_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    results = tangent_p.bind(*primals, **params)
    arrays, at = _open(primals, params)
    changes = _changes(tangents, params)
    terms = []
    u = operands_of(changes)
    if u:
        t = direction_of("t", arrays) | dict(zip(("out", "lse"), results, strict=True))
        u |= {name: changes.get(name) for name in ("out", "lse")}
        terms.append(at.tangent2(t, at.with_residuals(u)))
    if direction_of("t", changes):
        terms.append(at.tangent(direction_of("t", changes)))
    return results, _total(terms, results)


def _backward_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    results = backward_p.bind(*primals, **params)
    arrays, at = _open(primals, params)
    changes = _changes(tangents, params)
    wrt = params["wrt"]
    g, h = cotangents_of(arrays), cotangents_of(changes)
    if h and "dout" not in h:
        h["dout"] = jnp.zeros_like(g["dout"])
    t = operands_of(changes)
    if t:
        t |= {name: changes.get(name) for name in ("out", "lse")}
        dots = at.second(at.with_residuals(t), g, h, wrt)
    elif h:
        dots = at.backward(h, wrt)
    else:
        return results, [_compat.zero_tangent(a) for a in results]
    return results, list(dots.values())


def _tangent2_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    results = tangent2_p.bind(*primals, **params)
    arrays, at = _open(primals, params)
    changes = _changes(tangents, params)
    _no_third_order(changes)
    terms = []
    for letter, other in (("t", "u"), ("u", "t")):
        change = direction_of(letter, changes)
        if operands_of(change):
            fixed = at.with_residuals(direction_of(other, arrays))
            terms.append(at.tangent2(at.with_residuals(change), fixed))
    return results, _total(terms, results)


def _second_jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    results = second_p.bind(*primals, **params)
    arrays, at = _open(primals, params)
    changes = _changes(tangents, params)
    _no_third_order(changes)
    wrt, terms = params["wrt"], []
    t, g = direction_of("t", arrays), cotangents_of(arrays)
    t_dot, g_dot = direction_of("t", changes), cotangents_of(changes)
    h_dot = cotangents_of(direction_of("u", changes))
    for change in (g_dot, h_dot):
        if change and "dout" not in change:
            change["dout"] = jnp.zeros_like(g["dout"])
    if operands_of(t_dot):
        terms.append(at.second(at.with_residuals(t_dot), g, h_dot, wrt).values())
    elif h_dot:
        terms.append(at.backward(h_dot, wrt).values())
    if g_dot:
        terms.append(at.second(t, g_dot, {}, wrt).values())
    return results, _total(terms, results)


def _total(terms: list[Any], results: Any) -> list[Any]:
    return _sum(*terms) if terms else [_compat.zero_tangent(a) for a in results]


# ------------------------------------------------------------------------- transposes


def _transposed(rule: Any) -> Any:
    """A transpose rule, from one that works by names.

    ``rule(cts, arrays, at, linear)`` gets the cotangents, the arrays that are not linear,
    the point, and the names and types of those that are; it returns cotangents by name,
    which are summed to their operands' shapes here.
    """

    def transpose(cts: Any, *values: Any, **params: Any) -> list[Any]:
        if all(type(ct) is ad.Zero for ct in cts):
            return [None] * len(values)
        arrays, at = _open(values, params)
        linear = {
            name: a.aval for name, a in arrays.items() if ad.is_undefined_primal(a)
        }
        arrays = {name: a for name, a in arrays.items() if name not in linear}
        results = rule(cts, arrays, at, linear, params["wrt"])
        return [
            like(results[name], linear[name])
            if name in linear and results.get(name) is not None
            else None
            for name in params["present"]
        ]

    return transpose


def _wanted(letter: str, linear: Named) -> tuple[str, ...]:
    return tuple(operands_of(direction_of(letter, linear)))


def _tangent_transpose(
    cts: Any, arrays: Named, at: At, linear: Named, wrt: Any
) -> Named:
    del arrays, wrt
    return prefixed("t", at.backward(at.cotangent(*cts), _wanted("t", linear)))


def _tangent2_transpose(
    cts: Any, arrays: Named, at: At, linear: Named, wrt: Any
) -> Named:
    del wrt
    letter, other = ("t", "u") if _wanted("t", linear) else ("u", "t")
    fixed = at.with_residuals(direction_of(other, arrays))
    wanted = _wanted(letter, linear)
    return prefixed(letter, at.second(fixed, at.cotangent(*cts), {}, wanted))


def _directions(cts: Any, wrt: tuple[str, ...]) -> Named:
    """Cotangents of gradients, by operand name: a direction in x."""
    named = zip(("query", "key", "value", *wrt), cts, strict=True)
    return {name: ct for name, ct in named if type(ct) is not ad.Zero}


def _backward_transpose(
    cts: Any, arrays: Named, at: At, linear: Named, wrt: Any
) -> Named:
    del arrays, linear
    out, lse = at.tangent(_directions(cts, wrt))
    return {"dout": out, "dlse": lse}


def _second_transpose(
    cts: Any, arrays: Named, at: At, linear: Named, wrt: Any
) -> Named:
    u = at.with_residuals(_directions(cts, wrt))
    results = {"u_dout": u["out"], "u_dlse": u["lse"]}
    wanted = _wanted("t", linear)
    if wanted:
        grads = at.second(u, cotangents_of(arrays), {}, wanted)
        return results | prefixed("t", grads)
    if "dout" in linear or "dlse" in linear:
        out, lse = at.tangent2(direction_of("t", arrays), u)
        results |= {"dout": out, "dlse": lse}
    return results


for _primitive, _jvp in (
    (forward_p, _forward_jvp),
    (tangent_p, _tangent_jvp),
    (backward_p, _backward_jvp),
    (tangent2_p, _tangent2_jvp),
    (second_p, _second_jvp),
):
    ad.primitive_jvps[_primitive] = _jvp
for _primitive, _transpose in (
    (tangent_p, _tangent_transpose),
    (backward_p, _backward_transpose),
    (tangent2_p, _tangent2_transpose),
    (second_p, _second_transpose),
):
    ad.primitive_transposes[_primitive] = _transposed(_transpose)
