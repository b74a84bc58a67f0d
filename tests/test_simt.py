"""The CUDA kernels of csrc, unmodified, on a CPU: every formula, type and layout, no GPU needed.

tests/simt stands in for the GPU (see simt.h there). The kernels run under AddressSanitizer and
UndefinedBehaviorSanitizer, in a program of their own that reads cases and writes results, so that
an access out of bounds ends it. References are plain float64, and a Philox of our own.
"""

import math
import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SIMT = ROOT / "tests" / "simt"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of DType

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler {CXX}")


# ---- building ---------------------------------------------------------------------------------


def build(folder: Path, sources: list[Path], csrc: Path, flags: list[str]) -> Path:
    """Compiles sources, .cu among them, side by side and links them with the scheduler."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile(source: Path) -> str:
        target = folder / f"{source.name}.o"
        command = [CXX, *FLAGS, *flags, f"-I{csrc}", "-include", SIMT / "simt.h", "-x", "c++"]
        subprocess.run([*command, "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, [*sources, SIMT / "run.cpp", SIMT / "simt.cpp"]))
    subprocess.run([CXX, *flags, *objects, "-o", folder / "run"], check=True)
    return folder / "run"


@pytest.fixture(scope="session")
def program(request: pytest.FixtureRequest) -> Path:
    """Built once per state of the sources, kept in pytest's cache."""
    csrc = ROOT / "csrc"
    inputs = [*csrc.glob("*.cu*"), *csrc.glob("*.h"), *SIMT.iterdir(), Path(__file__)]
    stamp = sha256(b"".join(path.read_bytes() for path in sorted(inputs))).hexdigest()[:16]
    cache = Path(request.config.cache.mkdir("simt"))
    target = cache / stamp / "run"
    if not target.exists():
        for old in cache.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        build(target.parent, sorted(csrc.glob("*.cu")), csrc, SANITIZE)
    return target


# ---- cases ------------------------------------------------------------------------------------


@dataclass
class Case:
    """One sweep. Inputs are [outer, inner, columns] tensors of any strides, row input [rows]."""

    formula: str
    inputs: list[torch.Tensor]
    row_input: torch.Tensor | None = None
    key: tuple[int, int] = (0, 0)
    wanted: int = -1
    offsets: list[int] = field(default_factory=lambda: [0] * 6)  # elements; of inputs, and outputs
    lend_partial_sums: bool = False
    highest_first: bool = False
    most_blocks: int = 2**31 - 1
    only_block: int = -1
    virtual_bytes: int = 0
    missing: int = 0  # elements withheld from the end of each input: a test of the tests

    @property
    def spec(self) -> "Formula":
        return FORMULAS[self.formula]

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def pack(self) -> bytes:
        spec, item = self.spec, self.inputs[0].element_size()
        message = [
            struct.pack(
                "<64s17qd",
                self.formula.encode(),
                DTYPES.index(self.dtype),
                *self.inputs[0].shape,
                len(self.inputs),
                int(spec.row_input),
                spec.outputs,
                int(spec.row_sum),
                self.wanted & (2**spec.outputs - 1),
                self.offsets[5],
                int(self.lend_partial_sums),
                int(self.highest_first),
                self.most_blocks,
                self.only_block,
                self.virtual_bytes,
                *np.array(self.key, np.uint64).astype(np.int64).tolist(),
                spec.parameter,
            )
        ]
        for tensor, offset in zip(self.inputs, self.offsets, strict=False):
            data = reachable_bytes(tensor)
            data = data[: len(data) - self.missing * item]
            header = (len(data), offset * item, *tensor.stride())
            message += [struct.pack("<5q", *header), data]
        if self.row_input is not None:
            message.append(self.row_input.to(self.row_dtype).numpy().tobytes())
        return b"".join(message)

    def unpack(
        self, data: memoryview
    ) -> tuple[list[torch.Tensor | None], torch.Tensor | None, int]:
        outer, inner, columns = self.inputs[0].shape
        at = 0

        def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            nonlocal at
            size = math.prod(shape) * dtype.itemsize
            raw = bytearray(data[at : at + size])
            at += size
            return (
                torch.frombuffer(raw, dtype=dtype).reshape(shape)
                if raw
                else torch.empty(shape, dtype=dtype)
            )

        shape = (outer, inner, columns)
        if self.virtual_bytes:
            shape = (self.virtual_bytes // self.dtype.itemsize,)
        outputs = [
            take(shape, self.dtype) if self.wanted >> k & 1 else None
            for k in range(self.spec.outputs)
        ]
        row_sum = take((outer, inner), self.row_dtype) if self.spec.row_sum else None
        return outputs, row_sum, at


def reachable_bytes(tensor: torch.Tensor) -> bytes:
    """The memory from the first to the last element of a tensor, and none beyond."""
    if tensor.numel() == 0:
        return b""
    extents = [(n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
    span = 1 + sum(extents)
    return tensor.as_strided((span,), (1,)).view(torch.uint8).numpy().tobytes()


def run(program: Path, *cases: Case) -> list[tuple[list[torch.Tensor | None], torch.Tensor | None]]:
    done = subprocess.run([program], input=b"".join(c.pack() for c in cases), capture_output=True)
    if done.returncode != 0:
        raise AssertionError(done.stderr.decode()[:4000])
    answer, results = memoryview(done.stdout), []
    for case in cases:
        outputs, row_sum, size = case.unpack(answer)
        results.append((outputs, row_sum))
        answer = answer[size:]
    assert len(answer) == 0
    return results


# ---- references -------------------------------------------------------------------------------


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters [n, 4] as in Salmon et al. (2011), in numpy."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> high) ^ c[1] ^ np.uint64(k0),
            p1 & low,
            (p0 >> high) ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(c, 1).astype(np.uint32)


def words(key: tuple[int, int], first: int, count: int) -> np.ndarray:
    """The words of blocks first, ..., first + count - 1 of a key's stream: [count, 4]."""
    seed, offset = key
    index = [(offset + first + i) % 2**64 for i in range(count)]
    counter = np.array([(i % 2**32, i // 2**32, 0, 0) for i in index], np.uint64).reshape(-1, 4)
    return philox(counter, (seed % 2**32, seed // 2**32))


def normals(key: tuple[int, int], first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements first, ..., first + count - 1: Box-Muller in float64, of the type's own uniforms."""
    real = np.float64 if dtype == torch.float64 else np.float32
    block = first // 4
    x = words(key, block, (first + count + 3) // 4 - block).reshape(-1, 2)
    u = (x.astype(real) * real(2**-32) + real(2**-33)).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    return torch.from_numpy(z[first - 4 * block :][:count])


def gumbels(key: tuple[int, int], count: int) -> torch.Tensor:
    """The first elements' -log(-log u), of the exact u."""
    u = words(key, 0, (count + 3) // 4).reshape(-1)[:count] * 2.0**-32 + 2.0**-33
    return torch.from_numpy(-np.log(-np.log(u)))


@dataclass(frozen=True)
class Formula:
    """What a formula takes, and its reference: inputs, row input, noise -> outputs, term."""

    reference: object
    inputs: int
    outputs: int = 0
    row_sum: bool = False
    row_input: bool = False
    noise: bool = False
    gumbel: bool = False  # of that distribution
    reduces: bool = False  # the term is the row's value already, not what adds up to it
    low: float = -2.0  # inputs are drawn from here to 2
    parameter: float = 0.0


def bernoulli_log_prob(x, a):
    return x * a - torch.nn.functional.softplus(a, threshold=60)


def continuous_bernoulli_log_prob(x, a):
    """e^xa over its integral on [0, 1], by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    integral = sum(w / 2 * torch.exp((u + 1) / 2 * a) for u, w in zip(nodes, weights, strict=True))
    return x * a - torch.log(integral)


def logistic_bin(x, mean, scale, half=1 / 255):
    """log of the mass of x's bin, by hyperbolic functions: at these scales they are in range."""
    u, h = (x - mean) / scale, half / scale
    inner = torch.log(torch.sinh(h) / (torch.cosh(u) + torch.cosh(h)))
    outer = torch.where(x > 0, u - h, -u - h)
    return torch.where(x.abs() > 1 - half, -torch.log1p(torch.exp(outer)), inner)


def poisson_log_prob(x, r):
    return x * r - torch.exp(r) - torch.lgamma(x + 1)


def negative_binomial_log_prob(x, m, t):
    p = m / (m + t)
    binomial = torch.lgamma(x + t) - torch.lgamma(t) - torch.lgamma(x + 1)
    return binomial + t * torch.log1p(-p) + x * torch.log(p)


def zero_inflated_negative_binomial_log_prob(x, m, t, a):
    counts, log_sigmoid = negative_binomial_log_prob(x, m, t), torch.nn.functional.logsigmoid
    zero = torch.logaddexp(log_sigmoid(a), log_sigmoid(-a) + counts)
    return torch.where(x == 0, zero, log_sigmoid(-a) + counts)


def row_sum(name, term, inputs, low=-2.0, parameter=0.0):
    """Forward and backward of a RowSum, from its term: autograd knows the gradient."""

    def backward(*arguments):
        *inputs, grad = arguments
        inputs = [x.detach().requires_grad_() for x in torch.broadcast_tensors(*inputs)]
        slopes = torch.autograd.grad(term(*inputs).sum(), inputs)
        return [grad * slope for slope in slopes], None

    return {
        f"{name}.Forward": Formula(
            lambda *xs: ([], term(*xs)), inputs, row_sum=True, low=low, parameter=parameter
        ),
        f"{name}.Backward": Formula(
            backward, inputs, outputs=inputs, row_input=True, low=low, parameter=parameter
        ),
    }


COLDNESS = 0.3671  # 1 / temperature
FREE_BITS = 0.3671  # no KL of half-precision numbers is exactly that
SIGMA = {
    "LogVar": lambda s: torch.exp(s / 2),
    "LogScale": torch.exp,
    "Scale": lambda s: s,
    "Softplus": lambda s: torch.nn.functional.softplus(s, threshold=60),
}


def with_scale(name):
    """What takes a scale, given by the map of that name; gradients by autograd."""
    sigma, low = SIGMA[name], 0.2 if name == "Scale" else -2.0

    def slopes(function, *inputs):
        inputs = [x.detach().requires_grad_() for x in torch.broadcast_tensors(*inputs)]
        return torch.autograd.grad(function(*inputs).sum(), inputs)

    def sample(m, s, e):
        return m + sigma(s) * e

    def sample_backward(g, s, e):
        return [g * slopes(lambda s: sigma(s) * e, s)[0]], None

    def prior_kl(m, s, p, t):
        r = sigma(s) / sigma(t)
        return ((m - p) ** 2 / sigma(t) ** 2 + r**2 - 1) / 2 - torch.log(r)

    def standard_kl(m, s):
        return (m**2 + sigma(s) ** 2 - 1) / 2 - torch.log(sigma(s))

    def free(kl):
        return lambda *inputs: kl(*inputs).clamp(min=FREE_BITS)

    def gaussian_log_prob(x, m, s):
        return -(math.log(2 * math.pi) + (x - m) ** 2 / sigma(s) ** 2) / 2 - torch.log(sigma(s))

    def laplace_log_prob(x, m, s):
        return -math.log(2) - torch.log(sigma(s)) - (x - m).abs() / sigma(s)

    def bin_log_prob(x, m, s):
        return logistic_bin(x, m, sigma(s))

    formulas = {
        f"Reparameterize<{name}>.Forward": Formula(
            lambda m, s, e: ([sample(m, s, e)], None), 2, outputs=1, noise=True, low=low
        ),
        f"Reparameterize<{name}>.Backward": Formula(
            sample_backward, 2, outputs=1, noise=True, low=low
        ),
        **row_sum(f"GaussianLogProb<{name}>", gaussian_log_prob, 3, low=low),
        **row_sum(f"DiscretizedLogistic<{name}>", bin_log_prob, 3, low=low, parameter=255.0),
        **row_sum(f"LaplaceLogProb<{name}>", laplace_log_prob, 3, low=low),
    }
    for suffix, parameter, standard, prior in (
        ("", 0.0, standard_kl, prior_kl),
        (", true", FREE_BITS, free(standard_kl), free(prior_kl)),
    ):
        options = {"low": low, "parameter": parameter}

        def backward(z, m, s, g, e, kl=standard):
            d_m, d_s = slopes(kl, m, s)
            return [z + g * d_m, sample_backward(z, s, e)[0][0] + g * d_s], None

        both = f"ReparameterizeKl<{name}{suffix}>"
        formulas |= row_sum(f"StandardGaussianKl<{name}{suffix}>", standard, 2, **options)
        formulas |= row_sum(f"GaussianKl<{name}{suffix}>", prior, 4, **options)
        formulas[f"{both}.Forward"] = Formula(
            lambda m, s, e, kl=standard: ([sample(m, s, e)], kl(m, s)),
            2,
            outputs=1,
            row_sum=True,
            noise=True,
            **options,
        )
        formulas[f"{both}.Backward"] = Formula(
            backward, 3, outputs=2, row_input=True, noise=True, **options
        )
    return formulas


def coupling(name, forward, inverse, log_sigma):
    """Both directions, with and without a mask, each by its formula; gradients by autograd."""

    def both(inverse_too):
        def run(x, t, s, mask=None):
            move, term = (inverse, -log_sigma(s)) if inverse_too else (forward, log_sigma(s))
            y = move(x, t, log_sigma(s).exp())
            if mask is None:
                return y, term
            return torch.where(mask > 0.5, x, y), torch.where(mask > 0.5, 0.0, term)

        return run

    formulas = {}
    for inverse_too in (False, True):
        for masked in (False, True):
            run = both(inverse_too)

            def backward(grad, *rest, run=run):
                *inputs, grad_log_det = rest
                inputs = [x.detach().requires_grad_() for x in torch.broadcast_tensors(*inputs)]
                y, term = run(*inputs)
                loss = (grad * y + grad_log_det * term).sum()
                return torch.autograd.grad(loss, inputs[:3]), None

            def of_log_det(s, *rest, run=run):
                *mask, grad_log_det = rest
                s = s.detach().requires_grad_()
                term = run(torch.zeros_like(s), torch.zeros_like(s), s, *mask)[1]
                return [grad_log_det * torch.autograd.grad(term.sum(), s)[0]], None

            booleans = str(inverse_too).lower() + (", true" if masked else "")
            of = f"AffineCoupling<{name}, {booleans}>"
            formulas |= {
                f"{of}.Forward": Formula(
                    lambda *xs, run=run: ([run(*xs)[0]], run(*xs)[1]),
                    3 + masked,
                    outputs=1,
                    row_sum=True,
                ),
                f"{of}.Backward": Formula(backward, 4 + masked, outputs=3, row_input=True),
                f"{of}.BackwardOfLogDet": Formula(
                    of_log_det, 1 + masked, outputs=1, row_input=True
                ),
            }
    return formulas


def gumbel_softmax(x, g):
    return torch.softmax((x + g) * COLDNESS, -1)


def gumbel_one_hot(x, g):
    if x.numel() == 0:
        return x
    return torch.zeros_like(x + g).scatter(-1, (x + g).argmax(-1, keepdim=True), 1.0)


def gumbel_backward(grad, x, g):
    y = gumbel_softmax(x, g)
    return [y * (grad - (grad * y).sum(-1, keepdim=True)) * COLDNESS], None


def categorical_kl(q, p=None):
    log_q = torch.log_softmax(q, -1)
    log_p = torch.log_softmax(torch.zeros_like(q) if p is None else p, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def categorical_kl_backward(*arguments):
    *inputs, grad = arguments
    inputs = [x.detach().requires_grad_() for x in torch.broadcast_tensors(*inputs)]
    slopes = torch.autograd.grad(categorical_kl(*inputs).sum(), inputs)
    return [grad * slope for slope in slopes], None


FORMULAS = {
    **{
        f"CategoricalKl<{prior}>.Forward": Formula(
            lambda *xs: ([], categorical_kl(*xs)), count, row_sum=True, reduces=True
        )
        for prior, count in (("false", 1), ("true", 2))
    },
    **{
        f"CategoricalKl<{prior}>.Backward": Formula(
            categorical_kl_backward, count, outputs=count, row_input=True
        )
        for prior, count in (("false", 1), ("true", 2))
    },
    "CategoricalLogProb.Forward": Formula(None, 2, row_sum=True, reduces=True),
    "CategoricalLogProb.Backward": Formula(None, 2, outputs=1, row_input=True),
    "GumbelSoftmax.Forward": Formula(
        lambda x, g: ([gumbel_softmax(x, g)], None), 1, outputs=1, gumbel=True, parameter=COLDNESS
    ),
    "GumbelOneHot.Forward": Formula(
        lambda x, g: ([gumbel_one_hot(x, g)], None), 1, outputs=1, gumbel=True, parameter=COLDNESS
    ),
    "GumbelSoftmax.Backward": Formula(
        gumbel_backward, 2, outputs=1, gumbel=True, parameter=COLDNESS
    ),
    "GumbelOneHot.Backward": Formula(
        gumbel_backward, 2, outputs=1, gumbel=True, parameter=COLDNESS
    ),
    **{formula: spec for name in SIGMA for formula, spec in with_scale(name).items()},
    **coupling("Exp", lambda x, t, g: g * x + t, lambda y, t, g: (y - t) / g, lambda s: s),
    **coupling("TanhExp", lambda x, t, g: g * x + t, lambda y, t, g: (y - t) / g, torch.tanh),
    **coupling(
        "Sigmoid",
        lambda x, t, g: g * (x + t),
        lambda y, t, g: y / g - t,
        lambda s: torch.nn.functional.logsigmoid(s + 2),
    ),
    **coupling(
        "Gated",
        lambda x, t, g: g * x + (1 - g) * t,
        lambda y, t, g: (y - t) / g + t,
        torch.nn.functional.logsigmoid,
    ),
    "SylvesterDiagonal.Forward": Formula(
        lambda r, s: ([r.tanh(), s.tanh(), r.tanh() * s.tanh(), 1 + r.tanh() * s.tanh()], None),
        2,
        outputs=4,
    ),
    "SylvesterDiagonal.Backward": Formula(
        lambda r, s, d_r, d_s, d_gain: (
            [
                (d_r + d_gain * s.tanh()) / r.cosh() ** 2,
                (d_s + d_gain * r.tanh()) / s.cosh() ** 2,
            ],
            None,
        ),
        5,
        outputs=2,
    ),
    **row_sum("BernoulliLogProb", bernoulli_log_prob, 2),
    **row_sum("ContinuousBernoulliLogProb", continuous_bernoulli_log_prob, 2),
    **row_sum("PoissonLogProb", poisson_log_prob, 2, low=0.1),
    **row_sum("NegativeBinomialLogProb", negative_binomial_log_prob, 3, low=0.1),
    **row_sum(
        "ZeroInflatedNegativeBinomialLogProb", zero_inflated_negative_binomial_log_prob, 4, low=0.1
    ),
    "LogMeanExp.Forward": Formula(
        lambda w: ([], w.logsumexp(-1) - math.log(max(1, w.shape[-1]))),
        1,
        row_sum=True,
        reduces=True,
    ),
    "LogMeanExp.Backward": Formula(
        lambda w, g: ([g * torch.softmax(w, -1)], None), 1, outputs=1, row_input=True
    ),
}

# Of the largest value: a handful of roundings in the formula, then one to the storage type.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}


def check(case: Case, result: tuple[list[torch.Tensor | None], torch.Tensor | None]) -> None:
    outputs, row_sum = result
    shape = case.inputs[0].shape
    arguments = [x.double() for x in case.inputs]
    if case.spec.row_input:
        arguments.append(case.row_input.double().reshape(shape[0], shape[1], 1))
    if case.spec.noise:
        arguments.append(normals(case.key, 0, math.prod(shape), case.dtype).reshape(shape))
    if case.spec.gumbel:
        arguments.append(gumbels(case.key, math.prod(shape)).reshape(shape))
    expected, term = case.spec.reference(*arguments)

    for k, (got, want) in enumerate(zip(outputs, expected, strict=False)):
        if got is None:
            continue
        error = (got.double() - want).abs()
        bound = TOLERANCE[case.dtype] * (1 + want.abs())
        assert (error <= bound).all(), f"output {k} of {describe(case)}: {got} != {want}"
    if term is not None:
        term = term.unsqueeze(-1) if case.spec.reduces else term
        error = (row_sum.double() - term.sum(-1)).abs()
        error[row_sum == term.sum(-1)] = 0  # also where both are infinite
        bound = TOLERANCE[case.row_dtype] * (1 + term.abs()).sum(-1)
        assert (error <= bound).all(), f"sums of {describe(case)}: {row_sum} != {term.sum(-1)}"


def describe(case: Case) -> str:
    strides = [tuple(x.stride()) for x in case.inputs]
    shape = tuple(case.inputs[0].shape)
    return f"{case.formula} {case.dtype} {shape}, strides {strides}, offsets {case.offsets}"


# ---- layouts ----------------------------------------------------------------------------------


def laid_out(layout: str, shape: tuple[int, int, int], draw) -> torch.Tensor:
    """A random tensor of this shape, whose elements lie as the layout says."""
    outer, inner, columns = shape
    if layout == "rows repeat":  # a bias
        return draw(columns).expand(shape)
    if layout == "columns repeat":  # a scale for each row
        return draw(outer, inner, 1).expand(shape)
    if layout == "outer repeats":  # several samples of one batch
        return draw(inner, columns).expand(shape)
    if layout == "inner repeats":
        return draw(outer, 1, columns).expand(shape)
    if layout == "scalar":
        return draw(1).expand(shape)
    if layout == "transposed":
        return draw(outer, columns, inner).transpose(1, 2)
    if layout == "sliced":  # rows that do not begin aligned
        return draw(outer, inner, columns + 3)[..., :columns]
    if layout == "sliced aligned":
        return draw(outer, inner, columns + 16)[..., :columns]
    if layout == "every other":
        return draw(outer, inner, 2 * columns)[..., ::2]
    if layout == "swapped":  # [inner, outer, columns] in memory
        return draw(inner, outer, columns).transpose(0, 1)
    return draw(*shape)


LAYOUTS = (
    *("rows repeat", "columns repeat", "outer repeats", "inner repeats", "scalar"),
    *("transposed", "sliced", "sliced aligned", "every other", "swapped", "dense"),
)


def random_case(
    formula: str, dtype: torch.dtype, shape: tuple[int, int, int], seed: int, layouts
) -> Case:
    spec, rng = FORMULAS[formula], np.random.default_rng(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(spec.low, 2, size)).to(dtype)

    return Case(
        formula,
        [laid_out(rng.choice(layouts), shape, draw) for _ in range(spec.inputs)],
        torch.from_numpy(rng.uniform(-1, 1, shape[0] * shape[1])) if spec.row_input else None,
        key=tuple(rng.integers(2**64, size=2, dtype=np.uint64).tolist()),
        wanted=-1 if rng.random() < 0.7 else int(rng.integers(16)),
        offsets=rng.choice([0, 0, 0, 1, 2, 3], 6).tolist() if rng.random() < 0.5 else [0] * 6,
        lend_partial_sums=bool(rng.integers(2)),
        highest_first=bool(rng.integers(2)),
        most_blocks=int(rng.choice([1, 3, 2**31 - 1])),
    )


# ---- the tests --------------------------------------------------------------------------------

SHAPES = (
    *((1, 1, 1), (1, 300, 1), (1, 5, 3), (1, 33, 4), (3, 7, 8), (2, 9, 17), (1, 6, 32), (5, 1, 64)),
    *((1, 3, 127), (2, 2, 256), (1, 3, 259), (1, 2, 784), (3, 1, 1030), (1, 2, 2048), (1, 1, 4099)),
    *((1, 3, 0), (0, 4, 5), (1, 0, 0)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("formula", [f for f in FORMULAS if "CategoricalLogProb" not in f])
def test_formula(program: Path, formula: str, dtype: torch.dtype) -> None:
    cases = [random_case(formula, dtype, shape, i, ("dense",)) for i, shape in enumerate(SHAPES)]
    cases += [
        random_case(formula, dtype, shape, 100 + i, LAYOUTS) for i, shape in enumerate(SHAPES)
    ]
    for case, result in zip(cases, run(program, *cases), strict=False):
        check(case, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_layout(program: Path, dtype: torch.dtype) -> None:
    shapes = ((2, 3, 16), (2, 3, 13), (3, 1, 300))
    cases = [
        random_case("ReparameterizeKl<LogVar>.Forward", dtype, shape, i, (layout,))
        for i, layout in enumerate(LAYOUTS)
        for shape in shapes
    ]
    for case, result in zip(cases, run(program, *cases), strict=False):
        check(case, result)


@pytest.mark.parametrize("columns", [5, 32, 784, 40_000])
def test_schedule_does_not_matter(program: Path, columns: int) -> None:
    """Bitwise: the order of threads, and how many blocks share the work."""
    results = []
    for highest_first in (False, True):
        for most_blocks in (1, 3, 2**31 - 1):
            case = random_case(
                "ReparameterizeKl<LogVar>.Forward", torch.float32, (1, 5, columns), 7, ("dense",)
            )
            case.highest_first, case.most_blocks = highest_first, most_blocks
            case.wanted, case.lend_partial_sums = -1, True
            results.append(run(program, case)[0])
    check(case, results[0])
    for (z,), kl in results:
        assert torch.equal(z, results[0][0][0])
        assert torch.equal(kl, results[0][1])


@pytest.mark.parametrize("lend", [False, True], ids=("one block", "segments"))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_row_sums_stay_accurate(program: Path, dtype: torch.dtype, lend: bool) -> None:
    """3e-7 over a million terms of one sign, whichever way the row is shared out."""
    columns = 1_000_003
    rng = np.random.default_rng(0)
    inputs = [torch.from_numpy(rng.uniform(-2, 2, (1, 1, columns))).to(dtype) for _ in range(2)]
    case = Case("StandardGaussianKl<LogVar>.Forward", inputs, lend_partial_sums=lend)
    ((_, kl),) = run(program, case)
    _, term = FORMULAS[case.formula].reference(*[x.double() for x in inputs])
    expected = term.sum().item()
    assert abs(kl.item() / expected - 1) < (1e-14 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("offset", [0, 12345, 2**32 - 2, 2**64 - 1])
@pytest.mark.parametrize("seed", [0, 42, 2**64 - 3])
def test_philox_words(program: Path, seed: int, offset: int) -> None:
    header = struct.pack("<64s17Qd", b"philox", 0, 1, 1, 8, *[0] * 11, seed, offset, 0.0)
    done = subprocess.run([program], input=header, capture_output=True, check=True)
    assert np.array_equal(
        np.frombuffer(done.stdout, np.uint32).reshape(-1, 4), words((seed, offset), 0, 8)
    )


def test_reference_philox() -> None:
    """The known answers that come with the paper's code (Random123, kat_vectors)."""
    counter = [0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    key = (0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0)
    answer = (
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    )
    for c, k, a in zip(counter, key, answer, strict=False):
        assert philox(np.array([c], np.uint64), k).tolist() == [a]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("key", [(1, 0), (7, 2**32 - 30), (2**63 + 5, 2**64 - 30)], ids=str)
def test_noise(program: Path, key: tuple[int, int], dtype: torch.dtype) -> None:
    """mu = log_var = 0 leaves the noise: a few ulp, also where the counter carries."""
    zeros = torch.zeros(1, dtype=dtype).expand(1, 7, 33)
    (((z,), _),) = run(program, Case("Reparameterize<LogVar>.Forward", [zeros, zeros], key=key))
    expected = normals(key, 0, 7 * 33, dtype).reshape(1, 7, 33)
    ulp = torch.finfo(dtype).eps
    reference = 16 * torch.finfo(torch.float64).eps  # is no more exact than that
    assert ((z - expected).abs() <= 4 * ulp * expected.abs() + reference).all()


def test_more_than_two_to_the_31_elements(program: Path) -> None:
    """Only the last block of the grid runs, into outputs of 12 GB that are never all touched."""
    shape, tail = (1, 3, 2**30), 1024
    last = dict(only_block=2**16 - 1, virtual_bytes=4 * tail)
    mu, log_var = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[[0.5], [0.25], [-1.0]]])
    noise = Case(
        "Reparameterize<LogVar>.Forward",
        [x[:, 2:].expand(shape) for x in (mu, log_var)],
        key=(3, 4),
        **last,
    )
    rows = Case(
        "StandardGaussianKl<LogVar>.Backward",
        [x.expand(shape) for x in (mu, log_var)],
        torch.ones(3),
        **last,
    )
    ((z,), _), ((grad_mu, grad_log_var), _) = run(program, noise, rows)
    eps = normals((3, 4), math.prod(shape) - tail, tail, torch.float32)
    torch.testing.assert_close(z.double(), 3 + math.exp(-0.5) * eps, rtol=1e-6, atol=1e-6)
    assert (grad_mu == 3).all()
    torch.testing.assert_close(grad_log_var, torch.full((tail,), math.expm1(-1) / 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_classes(program: Path, dtype: torch.dtype) -> None:
    """Classes of several samples, shared or not, and such as there are none."""
    cases, expected = [], []
    for i, (outer, inner, columns) in enumerate(SHAPES):
        rng, shape = np.random.default_rng(i), (outer, inner, columns)

        def draw(*size: int, rng: np.random.Generator = rng) -> torch.Tensor:
            return torch.from_numpy(rng.uniform(-2, 2, size)).to(dtype)

        logits = laid_out(rng.choice(LAYOUTS), shape, draw)
        x = torch.from_numpy(rng.integers(-1, columns + 2, (outer if i % 2 else 1, inner, 1)))
        x.view(-1)[:1] = 2**40 if i % 3 else -(2**63)
        x, grad = x.expand(outer, inner, 1), torch.from_numpy(rng.uniform(-1, 1, outer * inner))
        exists = (x >= 0) & (x < columns)
        one_hot = (x == torch.arange(columns)).double()
        log_p = torch.log_softmax(logits.double(), -1)
        value = torch.where(exists.squeeze(-1), (one_hot * log_p).sum(-1), math.nan)
        slope = grad.reshape(outer, inner, 1).to(value.dtype) * (one_hot - log_p.exp())
        schedule = dict(highest_first=bool(i % 2), most_blocks=int(rng.choice([1, 3, 2**31 - 1])))
        cases.append(Case("CategoricalLogProb.Forward", [logits, x], **schedule))
        cases.append(Case("CategoricalLogProb.Backward", [logits, x], grad, **schedule))
        expected += [value, torch.where(exists, slope, math.nan)]
    for case, (outputs, row_sum), want in zip(cases, run(program, *cases), expected, strict=True):
        got = row_sum if case.spec.row_sum else outputs[0]
        bound = TOLERANCE[torch.float32 if case.spec.row_sum and dtype != torch.float64 else dtype]
        torch.testing.assert_close(
            got.double(), want, rtol=4 * bound, atol=4 * bound, equal_nan=True, msg=describe(case)
        )


# ---- pairs ------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """Rows that meet components, forward and backward."""

    rows: int
    components: int
    dims: int
    dtype: torch.dtype
    weighting: int = 0  # in the order of Weighting
    marginals: bool = False
    log_weights: bool = True
    scale: str = "LogVar"
    highest_first: bool = False
    most_blocks: int = 2**31 - 1

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.rows + 100 * self.components + self.dims)
        shapes = [(self.rows, self.dims), *[(self.components, self.dims)] * 2]
        shapes += [(self.components,)] * self.log_weights
        draw = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
        if self.scale == "Scale":
            draw[2] = 0.3 + draw[2].abs()
        self.inputs = [x.to(self.dtype) for x in draw]
        self.grads = [
            torch.randn(self.rows, generator=g, dtype=torch.float64).to(self.dtype)
            for _ in range(1 + self.marginals)
        ]
        self.weights = [math.log(0.3), math.log(0.2), math.log(0.4)]  # rest, own, next

    def log_w(self) -> torch.Tensor:
        """[rows, components]: what the weighting adds, in plain words."""
        rest, own, following = self.weights
        w = torch.full((self.rows, self.components), rest, dtype=torch.float64)
        for i in range(self.rows if self.weighting else 0):
            columns = {1: ((i + 1) % self.rows, i), 2: (1, 0)}[self.weighting]
            if columns[0] < self.components:
                w[i, columns[0]] = following
            w[i, columns[1]] = own
        if self.weighting == 2 and self.rows > 1:
            w[self.rows - 2, 0] = following
        return w

    def reference(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs, and the gradients of the inputs, by autograd in float64."""
        inputs = [x.to(torch.float64, copy=True).requires_grad_() for x in self.inputs]
        z, mu, s = inputs[:3]
        density = torch.distributions.Normal(mu, SIGMA[self.scale](s)).log_prob(z[:, None])
        log_w = self.log_w() + (inputs[3] if self.log_weights else 0.0)
        outputs = [torch.logsumexp(log_w + density.sum(-1), 1)]
        if self.marginals:
            outputs.append(torch.logsumexp(log_w[..., None] + density, 1).sum(-1))
        grads = torch.autograd.grad(outputs, inputs, [g.double() for g in self.grads])
        return [o.detach() for o in outputs], list(grads)

    def run(self, program: Path, backward: bool, *tensors: torch.Tensor) -> list[torch.Tensor]:
        columns = 2 + self.marginals * self.dims
        shapes = [x.shape for x in self.inputs]
        if not backward:
            shapes = [(self.rows,)] * (1 + self.marginals) + [(self.rows, columns)]
        schedule = (0, 0, int(self.highest_first), self.most_blocks, -1, 0, 0, 0)
        header = struct.pack(
            "<64s17qd",
            b"pairs",
            DTYPES.index(self.dtype),
            *(self.rows, self.components, self.dims),
            list(SIGMA).index(self.scale),  # in the order of ScaleMap
            *(0, 0, 0, 15 if self.log_weights else 7),
            *schedule,
            0.0,
        )
        given = (self.marginals, backward, self.log_weights, backward, backward and self.marginals)
        header += struct.pack("<6q3d", *map(int, given), self.weighting, *self.weights)
        data = b"".join(x.contiguous().numpy().tobytes() for x in (*self.inputs, *tensors))
        done = subprocess.run([program], input=header + data, capture_output=True)
        if done.returncode != 0:
            raise AssertionError(done.stderr.decode()[:4000])
        flat = torch.frombuffer(bytearray(done.stdout), dtype=self.dtype)
        parts = flat.split([math.prod(s) for s in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def results(self, program: Path) -> list[torch.Tensor]:
        *outputs, kept = self.run(program, False)
        return [*outputs, *self.run(program, True, kept, *self.grads)]


PAIRS = (
    *((1, 1, 1, 0, False), (5, 3, 2, 0, False), (33, 65, 20, 0, False), (4, 70, 129, 0, False)),
    *((2, 2, 3, 1, True), (33, 33, 5, 1, True), (34, 34, 7, 2, True), (3, 3, 140, 1, True)),
    *((6, 6, 33, 0, True), (7, 40, 0, 0, False)),
)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sizes", PAIRS, ids=str)
def test_pairs(program: Path, sizes: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    rows, components, dims, weighting, marginals = sizes
    check_pairs(program, Pairs(rows, components, dims, dtype, weighting, marginals, not marginals))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", SIGMA)
def test_scales_of_pairs(program: Path, scale: str, dtype: torch.dtype) -> None:
    for marginals in (False, True):
        check_pairs(program, Pairs(7, 7, 40, dtype, 0, marginals, not marginals, scale))


def check_pairs(program: Path, pairs: Pairs) -> None:
    outputs, grads = pairs.reference()
    scale = max(1.0, *(o.abs().max().item() for o in outputs))  # a weight takes its exponential
    tolerance = scale * (1e-6 if pairs.dtype == torch.float32 else 1e-14)
    for got, want in zip(pairs.results(program), [*outputs, *grads], strict=True):
        assert got.shape == want.shape
        if want.numel() > 0:
            error = (got.double() - want).abs().max()
            assert error <= tolerance * max(1.0, want.abs().max().item()), (pairs, error)


@pytest.mark.parametrize("marginals", [False, True])
def test_schedule_of_pairs_does_not_matter(program: Path, marginals: bool) -> None:
    results = []
    for highest_first in (False, True):
        for most_blocks in (1, 3, 2**31 - 1):
            pairs = Pairs(37, 37, 21, torch.float32, int(marginals), marginals, not marginals)
            pairs.highest_first, pairs.most_blocks = highest_first, most_blocks
            results.append(pairs.results(program))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_components_and_far_rows(program: Path) -> None:
    """-inf with a gradient of zero."""
    pairs = Pairs(3, 0, 4, torch.float32)
    log_prob, d_z, *_ = pairs.results(program)
    assert log_prob.isneginf().all()
    assert torch.equal(d_z, torch.zeros(3, 4))
    pairs = Pairs(3, 40, 4, torch.float32)
    pairs.inputs[0][1] = torch.finfo(torch.float32).max
    log_prob, d_z, *rest = pairs.results(program)
    assert log_prob.isneginf().tolist() == [False, True, False]
    assert torch.equal(d_z[1], torch.zeros(4))
    assert all(x.isfinite().all() for x in rest)


# ---- triangles --------------------------------------------------------------------------------


def run_triangles(
    program: Path,
    c: torch.Tensor,
    key: tuple[int, int],
    given: list[torch.Tensor],
    backward: bool,
    wanted: int = 3,
    highest_first: bool = False,
    most_blocks: int = 2**31 - 1,
) -> list[torch.Tensor]:
    rows, dims = given[-1].shape if backward else given[0].shape
    header = struct.pack(
        "<64s17qd",
        b"triangles",
        DTYPES.index(c.dtype),
        *(rows, c.shape[0], dims, 1, int(backward), 0, 0, wanted, 0, 0),
        *(int(highest_first), most_blocks, -1, 0),
        *key,
        0.0,
    )
    data = reachable_bytes(c)
    header += struct.pack("<5q", len(data), 0, *c.stride()) + data
    header += b"".join(x.contiguous().numpy().tobytes() for x in given)
    done = subprocess.run([program], input=header, capture_output=True)
    if done.returncode != 0:
        raise AssertionError(done.stderr.decode()[:4000])
    if backward:
        flat = torch.frombuffer(bytearray(done.stdout), dtype=c.dtype)
        return [flat.reshape(c.shape)]
    flat = torch.frombuffer(bytearray(done.stdout), dtype=given[0].dtype)
    return [x.reshape(y.shape) for x, y in zip(flat.split([rows * dims, rows]), given, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 3, 2), (2, 2, 33), (6, 3, 19), (5, 1, 130), (1, 1, 1100)], ids=str
)
def test_triangles(
    program: Path, sizes: tuple[int, int, int], layout: str, dtype: torch.dtype
) -> None:
    """Below the diagonal alone: what is on it the other engine has done, above there is NaN."""
    rows, triangles, dims = sizes
    if dims > 1000 and (layout != "dense" or dtype not in DTYPES[:2]):
        pytest.skip("more than one chunk of columns is shown once")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(dims)
    above = torch.ones(dims, dims, dtype=torch.bool).triu()
    c = torch.randn(triangles, dims, dims, generator=g).div(dims**0.5).to(dtype)
    c = c.masked_fill(above, math.nan)
    below = c.double().masked_fill(above, 0.0).repeat(rows // triangles, 1, 1)
    if layout == "transposed":
        c = c.mT.contiguous().mT
    elif layout == "sliced":
        c = torch.full((triangles, dims, 2 * dims + 3), math.nan, dtype=dtype)[..., 1:-2:2].copy_(c)
    z, kl = torch.randn(rows, dims, generator=g).to(wide), torch.randn(rows, generator=g).to(wide)
    grad_z, d_diagonal = torch.randn(2, rows, dims, generator=g).to(wide).unbind()
    key = (17, 2**62)
    eps = normals(key, 0, rows * dims, wide).reshape(rows, dims)
    scale = 1.0 + dims**0.5
    tolerance = scale * (2e-6 if wide == torch.float32 else 1e-14)
    for first in (False, True):
        schedule = {"highest_first": first, "most_blocks": 1 if first else 2**31 - 1}
        got = run_triangles(program, c, key, [z, kl], False, **schedule)
        want_z = z.double() + (below @ eps.unsqueeze(-1)).squeeze(-1)
        want_kl = kl.double() + below.square().sum((-2, -1)) / 2
        assert (got[0] - want_z).abs().max() <= tolerance
        assert ((got[1] - want_kl).abs() <= tolerance * (1 + want_kl.abs())).all()
        for wanted in (1, 2, 3):
            given = [*[grad_z] * (wanted & 1), *[kl] * (wanted >> 1), d_diagonal]
            (grad,) = run_triangles(program, c, key, given, True, wanted, **schedule)
            want = torch.diag_embed(d_diagonal.double())
            if wanted & 1:
                want = want + (grad_z.double().unsqueeze(-1) * eps.unsqueeze(-2)).tril(-1)
            if wanted & 2:
                want = want + kl.double()[:, None, None] * below
            want = want.reshape(-1, triangles, dims, dims).sum(0)
            error = (grad.double() - want).abs()
            assert (error <= max(TOLERANCE[dtype], tolerance) * (1 + want.abs()) * rows).all()


# ---- flows ------------------------------------------------------------------------------------


def planar_steps(z: torch.Tensor, u: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> list:
    log_det = torch.zeros_like(z[:, 0])
    for k in range(u.shape[-2]):
        dot, square = (u * w).sum(-1)[..., k], (w * w).sum(-1)[..., k]
        m = torch.log1p(torch.exp(dot)) - 1
        v = u[..., k, :] + ((m - dot) / square).unsqueeze(-1) * w[..., k, :]
        a = (w[..., k, :] * z).sum(-1) + b[..., k]
        z = z + v * torch.tanh(a).unsqueeze(-1)
        log_det = log_det + torch.log(1 + m / torch.cosh(a).square())
    return [z, log_det]


def radial_steps(z: torch.Tensor, c: torch.Tensor, al: torch.Tensor, be: torch.Tensor) -> list:
    log_det = torch.zeros_like(z[:, 0])
    for k in range(c.shape[-2]):
        a = torch.log1p(torch.exp(al[..., k]))
        b = torch.log1p(torch.exp(be[..., k])) - a
        r = (z - c[..., k, :]).norm(dim=-1)
        z = z + (b / (a + r)).unsqueeze(-1) * (z - c[..., k, :])
        stretch = 1 + b / (a + r)
        log_det = log_det + (z.shape[-1] - 1) * stretch.log()
        log_det = log_det + (stretch - b * r / (a + r).square()).log()
    return [z, log_det]


def reflections(z: torch.Tensor, v: torch.Tensor) -> list:
    for k in range(v.shape[-2]):
        n = v[..., k, :] / v[..., k, :].norm(dim=-1, keepdim=True)
        z = z - 2 * (n * z).sum(-1, keepdim=True) * n
    return [z, 0 * z[:, 0]]


def reflections_undone(z: torch.Tensor, v: torch.Tensor) -> list:
    return reflections(z, v.flip(-2))


def bisect(f, y: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The root of f(x) = y, increasing, as a function of all that f knows."""
    with torch.no_grad():
        for _ in range(200):
            middle = (low + high) / 2
            above = f(middle) > y
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    x = low.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    return low - (f(low) - y) / slope


def planar_undone(y: torch.Tensor, u: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> list:
    log_det = torch.zeros_like(y[:, 0])
    for k in reversed(range(u.shape[-2])):
        dot, square = (u * w).sum(-1)[..., k], (w * w).sum(-1)[..., k]
        m = torch.log1p(torch.exp(dot)) - 1
        v = u[..., k, :] + ((m - dot) / square).unsqueeze(-1) * w[..., k, :]
        c = (w[..., k, :] * y).sum(-1) + b[..., k]
        a = bisect(lambda a, m=m: a + m * torch.tanh(a), c, c - 1 - m.abs(), c + 1 + m.abs())
        y = y - v * torch.tanh(a).unsqueeze(-1)
        log_det = log_det - torch.log(1 + m / torch.cosh(a).square())
    return [y, log_det]


def radial_undone(y: torch.Tensor, c: torch.Tensor, al: torch.Tensor, be: torch.Tensor) -> list:
    log_det = torch.zeros_like(y[:, 0])
    for k in reversed(range(c.shape[-2])):
        a = torch.log1p(torch.exp(al[..., k]))
        b = torch.log1p(torch.exp(be[..., k])) - a
        far = (y - c[..., k, :]).norm(dim=-1)
        r = bisect(lambda r, a=a, b=b: r + b * r / (a + r), far, 0 * far, far + a)
        stretch = 1 + b / (a + r)
        y = c[..., k, :] + (y - c[..., k, :]) / stretch.unsqueeze(-1)
        log_det = log_det - (y.shape[-1] - 1) * stretch.log()
        log_det = log_det - (stretch - b * r / (a + r).square()).log()
    return [y, log_det]


def run_flow(program: Path, name: str, sizes: tuple, first: bool, tensors: tuple, shapes: list):
    """Of tensors of one dtype, sent one after the other, those of these shapes and dtypes."""
    sizes = (*sizes, *(0,) * (10 - len(sizes)))  # outer..lend_partial_sums
    options = (int(first), 1 if first else 2**31 - 1, -1, 0, 0, 0)
    dtype = DTYPES.index(tensors[0].dtype)
    header = struct.pack("<64s17qd", name.encode(), dtype, *sizes, *options, 0.0)
    raw = [x.contiguous().view(torch.uint8).flatten().numpy().tobytes() for x in tensors]
    done = subprocess.run([program], input=header + b"".join(raw), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    answer, at, got = bytearray(done.stdout), 0, []
    for shape, kind in shapes:
        size = math.prod(shape) * kind.itemsize
        got.append(torch.frombuffer(answer[at : at + size], dtype=kind).reshape(shape))
        at += size
    assert at == len(answer)
    return got


def sylvester_undone(c: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The root of a + (t + e) tanh(a) = c, element after element from the last."""
    a: list = []
    for m in reversed(range(c.shape[-1])):
        c_m, e_m = c[:, m], e[..., m].expand_as(c[:, m])
        if a:
            c_m = c_m - (t[..., m, m + 1 :] * torch.stack(a, -1).tanh()).sum(-1)
        ends = (c_m.detach() - 1 - e_m.detach().abs(), c_m.detach() + 1 + e_m.detach().abs())
        a.insert(0, bisect(lambda a, e=e_m: a + e * torch.tanh(a), c_m, *ends))
    return torch.stack(a, -1)


FLOWS = {
    "planar": planar_steps,
    "radial": radial_steps,
    "householder": reflections,
    "planar undone": planar_undone,
    "radial undone": radial_undone,
    "householder undone": reflections_undone,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("flow", FLOWS)
def test_flows(program: Path, flow: str, shared: bool, dtype: torch.dtype) -> None:
    steps, name = FLOWS[flow], flow.removesuffix(" undone") + "_flow"
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # more rows than warps that sum, than columns of a warp, and hardly any
    for rows, length, dims in ((1, 1, 1), (5, 3, 2), (37, 4, 33), (3, 2, 130), (1030, 2, 3)):
        if rows > 1000 and not shared:
            continue
        g = torch.Generator().manual_seed(dims)
        lead = () if shared else (rows,)
        sizes = [(rows, dims), (*lead, length, dims), (*lead, length, dims), (*lead, length)]
        if name == "radial_flow":
            sizes[2:] = [(*lead, length)] * 2
        if name == "householder_flow":
            sizes = sizes[:2]
        inputs = [torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]
        inputs[1:] = [x / dims**0.5 if x.shape[-1] == dims else x for x in inputs[1:]]
        inputs = [x.to(dtype) for x in inputs]
        exact = [x.double().requires_grad_() for x in inputs]
        outputs = steps(*exact)
        grads = [torch.randn(rows, dims, generator=g).to(dtype)]
        grads.append(torch.randn(rows, generator=g).to(wide))
        tolerance = 3e-5 if wide == torch.float32 else 1e-12

        def close(got: list, want: list, label: object, tolerance: float = tolerance) -> None:
            for x, y in zip(got, want, strict=True):
                scale = y.abs() + y.square().mean().sqrt()
                allowed = tolerance + (TOLERANCE[dtype] if x.dtype not in (wide,) else 0)
                assert ((x.double() - y).abs() <= allowed * (scale + 1e-3)).all(), label

        for first in (False, True):
            for wanted in (0, 1, 2, 3):
                given = [x for k, x in enumerate(grads) if wanted >> k & 1]
                shapes = [(x.shape, dtype) for x in inputs]
                if wanted == 0:
                    shapes = [(grads[0].shape, dtype), (grads[1].shape, wide)]
                sizes = (rows, length, dims, int(shared), int(wanted > 0), int("undone" in flow))
                got = run_flow(program, name, (*sizes, 0, wanted), first, (*inputs, *given), shapes)
                label = (rows, length, dims, first, wanted)
                if wanted == 0:
                    close(got, [x.detach() for x in outputs], label)
                    continue
                of = [x for k, x in enumerate(outputs) if wanted >> k & 1]
                want = torch.autograd.grad(
                    of, exact, [x.double() for x in given], retain_graph=True
                )
                close(got, list(want), label)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_sylvester_flows(program: Path, inverse: bool, shared: bool, dtype: torch.dtype) -> None:
    """The kernels take lines as csrc/sylvester.cpp lays them out, padded with zeros."""
    tolerance = 3e-5 if dtype == torch.float32 else 1e-12
    for rows, length, dims, rank in ((1, 1, 1, 1), (7, 3, 5, 2), (9, 2, 40, 33), (300, 2, 3, 3)):
        g = torch.Generator().manual_seed(dims)
        lead = (length,) if shared else (rows, length)

        def draw(*shape: int, g=g) -> torch.Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        z, b, product = draw(rows, dims), draw(*lead, rank), torch.tanh(draw(*lead, rank))
        inside, outside = (draw(*lead, dims, rank) / (dims * rank) ** 0.5 for _ in range(2))
        triangle = (draw(*lead, rank, rank) / rank**0.5).triu(1)
        exact = [z, inside, outside, b, 1 + product, *[triangle] * inverse]
        exact = [x.double().requires_grad_() for x in exact]
        x, log_det = exact[0], torch.zeros(rows, dtype=torch.float64)
        for k in reversed(range(length)) if inverse else range(length):
            step = [p[k] if shared else p[:, k] for p in exact[1:]]
            a = torch.einsum("rd,dm->rm" if shared else "rd,rdm->rm", x, step[0]) + step[2]
            if inverse:
                a = sylvester_undone(a, step[3] - 1, step[4])
            mix = "rm,dm->rd" if shared else "rm,rdm->rd"
            log = torch.log(1 + (step[3] - 1) / a.cosh().square()).sum(-1)
            moved = torch.einsum(mix, a.tanh(), step[1])
            x, log_det = (x - moved, log_det - log) if inverse else (x + moved, log_det + log)

        def padded(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)).flatten(-2)

        parts = [inside, inside.mT, outside, outside.mT, b.unsqueeze(-2)]
        parts += [(1 + product).unsqueeze(-2), product.unsqueeze(-2)]
        parts += [triangle, triangle.mT] * inverse
        lines = torch.cat([padded(p) for p in parts], -1)
        grads, width = [draw(rows, dims), draw(rows)], rank + -rank % 16
        for first in (False, True):
            for wanted in (0, 1, 2, 3):
                given = [t for i, t in enumerate(grads) if wanted >> i & 1]
                shapes = [(z.shape, dtype), ((rows,), dtype)]
                if wanted:
                    size = 2 * (dims + 1) + rank * inverse
                    shapes[1] = ((*lead, size * width), dtype)
                sizes = (rows, length, dims, int(shared), int(wanted > 0), int(inverse))
                sizes += (0, wanted, 0, rank)
                got = run_flow(program, "sylvester_flow", sizes, first, (z, lines, *given), shapes)
                want = [x, log_det]
                if wanted:
                    of = [t for i, t in enumerate(want) if wanted >> i & 1]
                    want = torch.autograd.grad(
                        of,
                        exact,
                        [t.double() for t in given],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                    ends = [dims * width, dims * width, width, width]
                    ends += [rank * width] * inverse
                    got[1:] = [
                        t.unflatten(-1, (-1, width))[..., :rank] for t in got[1].split(ends, dim=-1)
                    ]
                    got[3:5] = [t.squeeze(-2) for t in got[3:5]]
                    got[5:], want = (
                        [t.triu(1) for t in got[5:]],
                        [*want[:5], *(t.triu(1) for t in want[5:])],
                    )
                for t, e in zip(got, want, strict=True):
                    scale = e.abs() + e.square().mean().sqrt() + 1e-3
                    assert ((t.double() - e).abs() <= tolerance * scale).all()


# ---- autoregressive flows ---------------------------------------------------------------------

ACTIVATIONS = {  # in the order of Activation
    "relu": lambda a: np.maximum(a, 0),
    "leaky_relu": lambda a: np.where(a > 0, a, 0.01 * a),
    "elu": lambda a: np.where(a > 0, a, np.expm1(np.minimum(a, 0))),
    "silu": lambda a: a / (1 + np.exp(-a)),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "tanh": np.tanh,
}
KINDS = {  # in the order of AffineKind: sigma, and y, of s, x, t
    "exp": (np.exp, lambda sigma, x, t: sigma * x + t),
    "tanh_exp": (lambda s: np.exp(np.tanh(s)), lambda sigma, x, t: sigma * x + t),
    "sigmoid": (lambda s: 1 / (1 + np.exp(-s - 2)), lambda sigma, x, t: sigma * (x + t)),
    "gated": (lambda s: 1 / (1 + np.exp(-s)), lambda sigma, x, t: sigma * x + (1 - sigma) * t),
    "additive": (np.ones_like, lambda sigma, x, t: x + t),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_unrolled_autoregressive_flows(
    program: Path, kind: str, inverse: bool, dtype: torch.dtype
) -> None:
    """The reference masks by degrees, and passes once through all for each column."""
    sigma_of, apply = KINDS[kind]
    numbers = 1 if kind == "additive" else 2
    # (rows, dims, hidden, with sums): rows of several tiles, units of several warps, hardly any
    cases = [(1, 1, (), False), (9, 2, (1,), True), (33, 3, (), True), (3, 7, (3, 50), False)]
    cases += [(17, 5, (40, 3, 20), True), (2, 40, (70, 9), False)]
    for case, (rows, dims, hidden, with_sums) in enumerate(cases):
        g = np.random.default_rng(case)
        least = 0 if with_sums or dims == 1 else 1
        name = list(ACTIVATIONS)[(case + len(kind)) % len(ACTIVATIONS)]

        def draw(*shape: int, scale: float = 1.0, g=g) -> torch.Tensor:
            return torch.from_numpy(scale * g.standard_normal(shape)).to(dtype)

        degrees = [np.arange(1, dims + 1)]
        degrees += [least + np.arange(n) * (dims - least) // n for n in hidden]
        degrees.append(np.tile(np.arange(dims), numbers))
        widths = [len(d) for d in degrees]
        layers = list(zip(widths[1:], widths[:-1], strict=True))
        weights = [draw(n, m, scale=m**-0.5) for n, m in layers]
        biases = [draw(n) for n in widths[1:]]
        z, sums = draw(rows, dims), draw(rows, widths[1])

        exact = [w.double().numpy() for w in weights]
        masks = [b[:, None] >= a for a, b in pairwise(degrees)]
        x, log_det = np.zeros((rows, dims)), np.zeros(rows)
        for d in range(dims):
            h = x @ (exact[0] * masks[0]).T
            h = h + (sums if with_sums else biases[0]).double().numpy()
            for w, mask, bias in zip(exact[1:], masks[1:], biases[1:], strict=True):
                h = ACTIVATIONS[name](h) @ (w * mask).T + bias.double().numpy()
            sigma, t = sigma_of(h[:, dims + d if numbers == 2 else d]), h[:, d]
            given = z[:, d].double().numpy()
            if inverse:  # y is affine in x: apply(0) and the slope sigma
                x[:, d] = (given - apply(sigma, 0.0, t)) / sigma
            else:
                x[:, d] = apply(sigma, given, t)
            log_det += (-1 if inverse else 1) * np.log(sigma)

        tensors = [z, torch.tensor(widths)]
        for w, bias in zip(weights, biases, strict=True):
            tensors += [w, bias]
        tensors += [sums] * with_sums
        which = (list(KINDS).index(kind), int(inverse), list(ACTIVATIONS).index(name), least)
        sizes = (rows, len(layers), dims, *which, int(with_sums))
        shapes = [((rows, dims), dtype), ((rows,), dtype)]
        tolerance = 2e-5 if dtype == torch.float32 else 1e-12
        for first in (False, True):
            got = run_flow(program, "unroll_affine", sizes, first, tuple(tensors), shapes)
            for value, want in zip(got, (x, log_det), strict=True):
                error = np.abs(value.double().numpy() - want)
                assert (error <= tolerance * (1 + np.abs(x).max() + np.abs(want))).all(), case


# ---- splines ----------------------------------------------------------------------------------


def spline(
    x: torch.Tensor,
    widths: torch.Tensor,
    heights: torch.Tensor,
    slopes: torch.Tensor,
    inverse: bool,
    circular: bool,
    bound: float,
) -> list:
    """The paper's formulas, with its quadratic; knot by knot."""
    m = 1e-3
    bins = widths.shape[-1]
    w, h = (
        2 * bound * (m + (1 - m * bins) * torch.softmax(numbers, -1))
        for numbers in (widths, heights)
    )
    d = m + torch.nn.functional.softplus(slopes)
    one = torch.ones_like(w[..., :1])
    d = torch.cat([d, d[..., :1]], -1) if circular else torch.cat([one, d, one], -1)
    turns = torch.floor((x + bound) / (2 * bound)) * 2 * bound if circular else torch.zeros_like(x)
    v = x - turns
    y, log = x.clone(), torch.zeros_like(x)
    for k in range(bins):
        left, bottom = w[..., :k].sum(-1) - bound, h[..., :k].sum(-1) - bound
        w_k, h_k, d0, d1 = w[..., k], h[..., k], d[..., k], d[..., k + 1]
        s = h_k / w_k
        start, size = (bottom, h_k) if inverse else (left, w_k)
        here = (v >= start) & (v < start + size)
        if inverse:
            rise, q = torch.where(here, v - bottom, h_k / 2), d1 + d0 - 2 * s
            a, b, c = h_k * (s - d0) + rise * q, h_k * d0 - rise * q, -s * rise
            t = 2 * c / (-b - (b * b - 4 * a * c).sqrt())
        else:
            t = torch.where(here, (v - left) / w_k, 0.5)
        u = t * (1 - t)
        den = s + (d1 + d0 - 2 * s) * u
        slope = s**2 * (d1 * t**2 + 2 * s * u + d0 * (1 - t) ** 2) / den**2
        to = t * w_k + left if inverse else bottom + h_k * (s * t**2 + d0 * u) / den
        y = torch.where(here, to + turns, y)
        log = torch.where(here, -slope.log() if inverse else slope.log(), log)
    return [y, log.sum(-1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("circular", [False, True], ids=["linear", "circular"])
def test_splines(program: Path, inverse: bool, circular: bool, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 2.53  # which no input is
    # More numbers than a warp stages; and some that do not lie side by side.
    layouts = ((1, 1, 1, "own"), (67, 4, 3, "sliced"), (5, 7, 70, "own"), (9, 16, 33, "sliced"))
    for rows, bins, columns, layout in (*layouts, (9, 17, 5, "own"), (3, 5, 40, "apart")):
        g = torch.Generator().manual_seed(columns)
        slopes = bins if circular else bins - 1
        numbers = torch.randn(rows, columns, 2 * bins + slopes, generator=g, dtype=torch.float64)
        x = 2 * torch.randn(rows, columns, generator=g, dtype=torch.float64)
        inputs = [x.to(dtype), *numbers.to(dtype).split([bins, bins, slopes], -1)]
        if layout == "own":
            inputs[1:] = [n.contiguous() for n in inputs[1:]]
        elif layout == "apart":
            inputs[1:] = [n.mT.contiguous().mT for n in inputs[1:]]
        exact = [n.double().requires_grad_() for n in inputs]
        outputs = spline(*exact, inverse, circular, bound)
        grads = [torch.randn(rows, columns, generator=g).to(dtype)]
        grads.append(torch.randn(rows, generator=g).to(wide))
        tolerance = 3e-4 if wide == torch.float32 else 1e-11

        def close(got: list, want: list, label: object, tolerance: float = tolerance) -> None:
            for n, (a, b) in enumerate(zip(got, want, strict=True)):
                allowed = tolerance + (TOLERANCE[dtype] if a.dtype != wide else 0)
                scale = b.abs() + b.square().mean().sqrt()
                assert ((a.double() - b).abs() <= allowed * (scale + 1e-3)).all(), (label, n)

        for first in (False, True):
            for wanted in (0, 0b111101, 0b111110, 0b111111, 0b010111):
                given = [x for k, x in enumerate(grads) if wanted >> k & 1]
                message = struct.pack(
                    "<64s17qd",
                    b"spline",
                    DTYPES.index(dtype),
                    *(rows, bins, columns, int(inverse), int(wanted > 0), 0, int(circular), wanted),
                    *(0, 0, int(first), 1 if first else 2**31 - 1, -1, 0, 0, 0),
                    bound,
                )
                for n in inputs:
                    data, strides = reachable_bytes(n), [*n.stride(), 0][:3]
                    message += struct.pack("<5q", len(data), 0, *strides) + data
                message += b"".join(n.view(torch.uint8).numpy().tobytes() for n in given)
                done = subprocess.run([program], input=message, capture_output=True)
                assert done.returncode == 0, done.stderr.decode()[:4000]
                kinds = [(n.shape, dtype) for k, n in enumerate(inputs) if wanted >> 2 + k & 1]
                if wanted == 0:
                    kinds = [(grads[0].shape, dtype), (grads[1].shape, wide)]
                answer, at = bytearray(done.stdout), 0
                got = []
                for shape, kind in kinds:
                    size = math.prod(shape) * kind.itemsize
                    part = answer[at : at + size] or bytearray(kind.itemsize)
                    got.append(
                        torch.frombuffer(part, dtype=kind)[: math.prod(shape)].reshape(shape)
                    )
                    at += size
                assert at == len(answer)
                label = (rows, bins, columns, first, wanted)
                if wanted == 0:
                    close(got, [x.detach() for x in outputs], label)
                    continue
                of = [x for k, x in enumerate(outputs) if wanted >> k & 1]
                want = torch.autograd.grad(
                    of,
                    [x for k, x in enumerate(exact) if wanted >> 2 + k & 1],
                    [x.double() for x in given],
                    retain_graph=True,
                )
                close(got, [w for w in want], label)


# ---- pixels -----------------------------------------------------------------------------------


@dataclass
class Pixels:
    """A mixture of discretised logistics at pixels of four dimensions, forward and backward."""

    sizes: tuple[int, int, int, int]
    channels: int
    components: int
    dtype: torch.dtype
    layout: str = "last"
    coeffs: bool = True
    scale: str = "LogScale"
    wanted: int = 31
    highest_first: bool = False
    most_blocks: int = 2**31 - 1

    def __post_init__(self) -> None:
        rng = np.random.default_rng(math.prod(self.sizes) + 100 * self.channels + self.components)
        self.ends = [
            (self.channels, 1),
            (1, self.components),
            (self.channels, self.components),
            (self.channels, self.components),
            (self.channels * (self.channels - 1) // 2, self.components),
        ]
        draws = [torch.from_numpy(rng.uniform(-1.5, 1.5, self.sizes + end)) for end in self.ends]
        draws[0] = ((draws[0] + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        if self.scale == "Scale":
            draws[3] = 0.2 + draws[3].abs()
        self.inputs = [self.laid_out(x.to(self.dtype)) for x in draws[: 5 if self.coeffs else 4]]
        self.row_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        grad = torch.from_numpy(rng.uniform(-1, 1, math.prod(self.sizes)))
        self.grad = grad.to(self.row_dtype)

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "first":
            return x.permute(0, 4, 5, 1, 2, 3).contiguous().permute(0, 3, 4, 5, 1, 2)
        if self.layout == "sliced":
            wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
            return wide[..., 2 : 2 + x.shape[-1]].copy_(x)
        if self.layout == "strided":
            wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
            return wide[..., ::2].copy_(x)
        return x

    def reference(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        inputs = [x.to(torch.float64, copy=True).requires_grad_() for x in self.inputs]
        x, logits, mu, s = inputs[:4]
        scale = SIGMA[self.scale](s)
        score = logits[..., 0, :].log_softmax(-1)
        for c in range(self.channels):
            mean = mu[..., c, :]
            for j in range(c if self.coeffs else 0):
                mean = mean + inputs[4][..., c * (c - 1) // 2 + j, :].tanh() * x[..., j, :]
            score = score + logistic_bin(x[..., c, :], mean, scale[..., c, :])
        log_prob = score.logsumexp(-1)
        grad = self.grad.double().reshape(self.sizes)
        return log_prob.detach(), list(torch.autograd.grad(log_prob, inputs, grad))

    def results(self, program: Path) -> list[torch.Tensor]:
        def operand(x: torch.Tensor | None) -> bytes:
            if x is None:
                return struct.pack("<7q", *[0] * 7)
            strides = x.stride()
            pixel = reversed(strides[:4])
            return struct.pack("<7q", len(reachable_bytes(x)), *pixel, *strides[4:])

        def send(backward: bool, *tail: bytes) -> memoryview:
            schedule = (0, 0, int(self.highest_first), self.most_blocks, -1, 0, 0, 0)
            scale = list(SIGMA).index(self.scale)  # in the order of ScaleMap
            shape = (0, self.channels, self.components, scale, int(backward), 0, 0, 0)
            message = struct.pack(
                "<64s17qd", b"pixels", DTYPES.index(self.dtype), *shape, *schedule, 255.0
            )
            message += struct.pack("<4q", *reversed(self.sizes))
            for x in [*self.inputs, *[None] * (5 - len(self.inputs))]:
                message += operand(x) + (b"" if x is None else reachable_bytes(x))
            done = subprocess.run([program], input=message + b"".join(tail), capture_output=True)
            if done.returncode != 0:
                raise AssertionError(done.stderr.decode()[:4000])
            return memoryview(bytearray(done.stdout))

        pixels = math.prod(self.sizes)
        kept_and_value = torch.frombuffer(send(False), dtype=self.row_dtype)
        kept, value = kept_and_value.split([2 * pixels, pixels])
        wanted = [
            torch.empty_like(x) if self.wanted >> i & 1 else None for i, x in enumerate(self.inputs)
        ]
        rows = [x.numpy().tobytes() for x in (kept, self.grad)]
        answer = send(True, *rows, *map(operand, [*wanted, *[None] * (5 - len(wanted))]))
        results, at = [value.reshape(self.sizes)], 0
        for x in wanted:
            if x is None:
                continue
            size = len(reachable_bytes(x))
            flat = torch.frombuffer(answer[at : at + size], dtype=self.dtype)
            results.append(flat.as_strided(x.shape, x.stride()))
            at += size
        assert at == len(answer)
        return results


PIXELS = (
    *(((1, 1, 1, 1), 1, 1, "last"), ((2, 1, 3, 5), 3, 10, "last"), ((1, 1, 1, 300), 3, 3, "last")),
    *(
        ((2, 1, 5, 7), 3, 10, "first"),
        ((1, 2, 3, 2), 4, 9, "sliced"),
        ((3, 1, 2, 2), 20, 2, "last"),
    ),
    *(((2, 3, 2, 2), 3, 17, "strided"), ((1, 1, 4, 40), 1, 5, "first")),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", PIXELS, ids=str)
@pytest.mark.parametrize("coeffs", [True, False])
def test_pixels(program: Path, case, coeffs: bool, dtype: torch.dtype) -> None:
    sizes, channels, components, layout = case
    check_pixels(
        program, Pixels(sizes, channels, components, dtype, layout, coeffs and channels > 1)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", SIGMA)
def test_scales_of_pixels(program: Path, scale: str, dtype: torch.dtype) -> None:
    for layout in ("last", "first"):
        check_pixels(program, Pixels((2, 1, 3, 5), 3, 10, dtype, layout, scale=scale))


def check_pixels(program: Path, pixels: Pixels) -> None:
    dtype = pixels.dtype
    value, grads = pixels.reference()
    results = pixels.results(program)
    scale = max(1.0, value.abs().max().item())  # a weight takes its exponential
    tolerance = scale * (1e-14 if dtype == torch.float64 else 1e-6)
    assert ((results[0].double() - value).abs() <= tolerance).all()
    rounding = TOLERANCE[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0
    for got, want in zip(results[1:], grads, strict=True):
        error = (got.double() - want).abs()
        bound = tolerance * max(1.0, want.abs().max().item()) + rounding * (1 + want.abs())
        assert (error <= bound).all(), (error.max(), want.abs().max())


def test_schedule_of_pixels_does_not_matter(program: Path) -> None:
    results = []
    for highest_first in (False, True):
        for most_blocks in (1, 3, 2**31 - 1):
            pixels = Pixels((2, 1, 9, 11), 3, 10, torch.float32)
            pixels.highest_first, pixels.most_blocks = highest_first, most_blocks
            results.append(pixels.results(program))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("wanted", [0, 1, 2, 4, 8, 16])
def test_gradients_of_pixels_that_are_wanted(program: Path, wanted: int) -> None:
    case = ((1, 1, 3, 5), 3, 10, torch.float32)
    _, *full = Pixels(*case).results(program)
    _, *some = Pixels(*case, wanted=wanted).results(program)
    expected = [x for i, x in enumerate(full) if wanted >> i & 1]
    assert all(torch.equal(a, b) for a, b in zip(some, expected, strict=True))


# ---- tests of the tests -----------------------------------------------------------------------


def test_address_sanitizer_is_on(program: Path) -> None:
    """One element missing at the end of an input, in a pack and beyond one, is noticed."""
    for columns in (64, 65):
        case = random_case(
            "StandardGaussianKl<LogVar>.Forward", torch.float32, (1, 3, columns), 1, ("dense",)
        )
        case.missing, case.offsets = 1, [0] * 6
        with pytest.raises(AssertionError, match="heap-buffer-overflow"):
            run(program, case)


MUTANTS = {
    "none": ("", ""),
    "no barrier before the sum is read": (
        "if (lane == 0) partial[warp] = x;\n  __syncthreads();",
        "if (lane == 0) partial[warp] = x;",
    ),
    "no barrier before the next row": ("__syncthreads();  // the next", "// the next"),
    "the ends of rows not masked": ("slot.has(quad + i) ?", "true ?"),
    "a shuffle too few": ("int step = width / 2;", "int step = width / 4;"),
}


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The engine with one line changed each, and one formula of it."""
    folder = tmp_path_factory.mktemp("mutants")

    def mutate(index: int, old: str, new: str) -> Path:
        csrc = folder / str(index) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        engine = csrc / "rows.cuh"
        text = engine.read_text()
        assert text.count(old) == 1 or not old, f"rows.cuh has changed: {old!r}"
        engine.write_text(text.replace(old, new) if old else text)
        source = csrc / "mutant.cu"
        source.write_text(
            '#include "likelihood.h"\n#include "rows.cuh"\n'
            "namespace fastvae::cuda { FASTVAE_INSTANTIATE(BernoulliLogProb) }\n"
        )
        return build(csrc.parent, [source], csrc, ["-O0", "-Wno-error"])

    with ThreadPoolExecutor(2) as pool:
        built = [pool.submit(mutate, i, *change) for i, change in enumerate(MUTANTS.values())]
        return dict(zip(MUTANTS, (future.result() for future in built), strict=False))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(mutants: dict[str, Path], name: str) -> None:
    caught = False
    for highest_first in (False, True):
        for columns in (50, 1001):
            case = random_case(
                "BernoulliLogProb.Forward", torch.float32, (1, 5, columns), 3, ("dense",)
            )
            case.highest_first, case.most_blocks = highest_first, 1
            try:
                check(case, run(mutants[name], case)[0])
            except AssertionError:
                caught = True
    assert caught == (name != "none")
