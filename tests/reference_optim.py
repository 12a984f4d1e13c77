"""The optimizers as the papers write them, in float64 NumPy; and a bound of what rounding may add to them."""

import numpy as np


def sgd(p, g, state, t, *, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
    """p ← p − lr·v,  v ← μv + (1−d)g; Nesterov p ← p − lr·(g + μv)."""
    g = g + weight_decay * p
    if momentum == 0:
        return p - lr * g
    v = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + (1 - dampening) * g
    return p - lr * (g + momentum * v if nesterov else v)


def rmsprop(p, g, state, t, *, lr=1e-2, alpha=0.99, eps=1e-8, momentum=0.0, centered=False, weight_decay=0.0,
            eps_inside_sqrt=False):  # fmt: skip
    """s ← ρs + (1−ρ)g²;  p ← p − lr·g/(√s + ε); centered: s − ḡ²; momentum: v ← μv + g/(√s + ε)."""
    g = g + weight_decay * p
    s = state["square_avg"] = alpha * state.get("square_avg", 0.0) + (1 - alpha) * (g * g)
    if centered:
        mean = state["grad_avg"] = alpha * state.get("grad_avg", 0.0) + (1 - alpha) * g
        s = s - mean * mean
    v = g / root(s, eps, eps_inside_sqrt)
    if momentum:
        v = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + v
    return p - lr * v


def adam(p, g, state, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False,
         eps_inside_sqrt=False, decoupled=False):  # fmt: skip
    """v ← β₁v + (1−β₁)g;  s ← β₂s + (1−β₂)g²;  v̂ = v/(1−β₁ᵗ), ŝ = s/(1−β₂ᵗ);  p ← p − lr·v̂/(√ŝ + ε)."""
    beta1, beta2 = betas
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    v = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    s = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * (g * g)
    if amsgrad:
        s = state["max_exp_avg_sq"] = np.maximum(s, state.get("max_exp_avg_sq", 0.0))
    return p - lr * (v / (1 - beta1**t)) / root(s / (1 - beta2**t), eps, eps_inside_sqrt)


def adamw(p, g, state, t, *, weight_decay=0.01, **options):
    """First p ← p·(1 − lr·λ), then Adam."""
    return adam(p, g, state, t, weight_decay=weight_decay, decoupled=True, **options)


def root(s, eps, inside):
    """√(s + ε) or √s + ε."""
    return np.sqrt(s + eps) if inside else np.sqrt(s) + eps


def clipped(grads, clip_value=None, clip_norm=None, clip_global_norm=None):
    """g ← min(max(g, −c), c), or g ← g·c/‖g‖ where ‖g‖ > c, of each array or of all; None stays None."""

    def norm(arrays):
        return np.sqrt(sum(np.sum(a**2) for a in arrays if a is not None))

    def scaled(g, n, c):
        return g * (c / n) if n > c else g

    if clip_value is not None:
        return [g if g is None else np.clip(g, -clip_value, clip_value) for g in grads]
    if clip_norm is not None:
        return [g if g is None else scaled(g, norm([g]), clip_norm) for g in grads]
    if clip_global_norm is not None:
        return [g if g is None else scaled(g, norm(grads), clip_global_norm) for g in grads]
    return grads


METHODS = {"SGD": sgd, "RMSprop": rmsprop, "Adam": adam, "AdamW": adamw}
CLIPS = ("clip_value", "clip_norm", "clip_global_norm")


class Reference:
    """A list of arrays under one of METHODS: clip, then decay and update each; a gradient of None skips.

    With a `unit` (2⁻²⁴ for float32, 2⁻⁵³ for float64) every array is a `Rounded` one, which knows how far the
    same formulas may lead in an arithmetic of that precision.
    """

    def __init__(self, method, params, *, unit=None, schedule=None, **options):
        self.unit = unit
        self.params = [self.number(p, 0.0) for p in params]
        self.state = [{} for _ in params]
        self.clips = {name: options.pop(name) for name in CLIPS if name in options}
        self.update, self.options, self.schedule, self.steps = METHODS[method], options, schedule, 0

    def number(self, a, roundings):
        wide = a.astype(np.float64)
        return wide if self.unit is None else Rounded(wide, roundings * self.unit * np.abs(wide), self.unit)

    def step(self, grads):
        if self.schedule is not None:
            self.options["lr"] = self.schedule(self.steps)
        self.steps += 1
        for i, g in enumerate(
            clipped([g if g is None else g.astype(np.float64) for g in grads], **self.clips)
        ):
            if g is not None:
                g = self.number(g, 2.0 if self.clips else 0.0)  # the factor, and the product with it
                self.params[i] = self.update(self.params[i], g, self.state[i], self.steps, **self.options)


class Rounded:
    """An array and a bound of its error in an arithmetic with unit roundoff `unit`: running error analysis.

    Every operation passes the errors of its operands on, to first order, and adds its own rounding (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.3). A scalar is rounded too.
    """

    def __init__(self, value, error, unit):
        self.value, self.error, self.unit = value, error, unit

    def of(self, other):
        if isinstance(other, Rounded):
            return other
        return Rounded(np.float64(other), self.unit * np.abs(other), self.unit)

    def rounded(self, value, error):
        return Rounded(value, error + self.unit * np.abs(value), self.unit)

    def __add__(self, other):
        other = self.of(other)
        return self.rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other):
        other = self.of(other)
        return self.rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other):
        other = self.of(other)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        return self.rounded(self.value * other.value, error)

    def __truediv__(self, other):
        other = self.of(other)
        value = self.value / other.value
        return self.rounded(value, (self.error + np.abs(value) * other.error) / np.abs(other.value))

    __radd__, __rmul__ = __add__, __mul__

    def __array_ufunc__(self, ufunc, method, *inputs):
        if ufunc is np.sqrt:
            value = np.sqrt(self.value)
            slope = self.error / np.maximum(2 * value, 1e-300)
            return self.rounded(value, np.minimum(slope, np.sqrt(self.error)))
        if ufunc is np.maximum:
            a, b = map(self.of, inputs)
            return Rounded(np.maximum(a.value, b.value), np.maximum(a.error, b.error), self.unit)
        return {np.add: Rounded.__radd__, np.multiply: Rounded.__rmul__}[ufunc](self, inputs[0])
