"""The main job: compress one model to one budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cobla_onnx.allocation import Budget
from cobla_onnx.allocation.budget import check_budget
from cobla_onnx.errors import UsageError
from cobla_onnx.options import Settings
from cobla_onnx.options.signatures import SearchOptions, takes_options
from cobla_onnx.pipeline.inputs import ModelSource
from cobla_onnx.pipeline.max_drop import check_max_drop, smallest
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.result import Result
from cobla_onnx.pipeline.timed import check_arithmetic
from cobla_onnx.plan import Plan
from cobla_onnx.report.provenance import call_text
from cobla_onnx.wording import either, option_name

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["compress"]


@takes_options("compress", own_after="measure_latency")
def compress(
    model: ModelSource,
    budget: Budget | None = None,
    *,
    max_drop: float | None = None,
    plan: Plan | None = None,
    **options: Unpack[SearchOptions],
) -> Result:
    """Compress a model so that it fits a budget, and verify it in onnxruntime.

    Parameters
    ----------
    model : ModelProto or path
        It is not changed.
    budget : Budget, optional
        Fractions of the original's weight bytes, MACs and running time to keep at most.
        Needed unless there is a plan or a `max_drop`.
    solver : {'slsqp', 'milp'}
        ``slsqp`` relaxes the masks, solves and rounds (COBLA); ``milp`` solves the
        separable integer problem alone.
    objective : {'auto', 'weights', 'output', 'loss'}
        What is minimised. ``weights``: the relative weight error, summed over layers.
        ``output``: the measured loss of truncating each layer alone, summed; it needs
        data. ``loss``: the network's loss itself, by its gradient, starting from the
        answer for ``output``; it takes longer. ``auto`` is ``output`` with data and
        ``weights`` without.
    input_shapes : mapping of str to sequence of int, optional
        Shapes of inputs with unknown axes; a symbolic batch counts as 1.
    include, exclude : sequence of str
        Glob patterns for names of layers.
    min_size : int
        Layers with fewer weights are left whole.
    deduplicate : bool
        Constants of the same type, shape and bytes are stored once; budgets remain fractions of
        the original as it is. Names of layers in plans are those of a model without copies.
    scheme : {'auto', 'spatial', 'channel', 'input'}
        Matricisation of convolutions; ``auto`` lets the solver choose for each.
    data : path, mapping, iterable or CalibrationDataReader, optional
        Samples of what the model will see, without labels: an ``.npz`` (an array for each
        input) or ``.npy`` file, a folder of images, a folder of ONNX ``test_data_set_*``
        folders, arrays by input name, an iterable of dicts, or an object with
        ``get_next()``. A fifth is held back: it chooses between plans, and verifies.
    samples : int, optional
        How many samples to use at most.
    batch : 'auto' or int
        How many to run at a time. ``auto``: up to 16, as many as `memory_limit` has room for,
        and one where the model does not take more, or mixes them.
    memory_limit : int or str, optional
        Bytes of memory that the process takes at most, such as ``"2GB"``; 2 GB above the
        model. A batch that is a number may take more.
    images : ImageOptions, optional
        How images become inputs.
    labels : path, sequence of int, or mapping of str to int, optional
        Classes of the samples, in their order or by file name, or a ``.csv``, ``.npy`` or
        ``.npz`` file of them; for outputs with a class for each token or pixel, an array of one
        for each. -100 does not count. The loss is then the cross-entropy.
    loss : {'auto', 'kl', 'mse', 'ce'}
        How outputs are compared with the original's; ``auto`` goes by evidence, see
        `Chooser`. The others insist on classes, or on values.
    outputs : sequence of str, or mapping of str to str
        Which outputs count and how: ``NAME[=classes|values|ignore][:AXIS]``, or by name what
        follows the ``=``. Where one is named without ``=``, those that are not named do not
        count. The axis is that of the classes, or of the features.
    refit : bool
        Refit factors to the inputs that they get after compression; needs data.
    distil : 'auto' or int, optional
        Let what is stored for the layers, and their biases, learn from the original's outputs on
        the samples afterwards: in so many passes over them, or as long as that helps. It is kept
        if, in trials on halves of the samples, the other half gains beyond the noise.
        Needs data, and gains most with a thousand samples or more.
    augment : str, optional
        ``flip``, ``crop:N`` or both, as ``flip,crop:4``: in distillation, images are exchanged left
        and right and moved by up to N pixels, at random; the original says anew what is right.
    time_limit : float, optional
        Seconds that the search by the network's loss, and distillation, may take each. The
        result then depends on the machine's speed.
    precision : {'keep', 'auto'} or tuple of int
        In how many bits weights, whole or as factors, may be stored: as they are, any of
        `storage.precision.FORMATS`, or those given. The programme chooses for each layer.
    arithmetic : {'keep', 'int8', 'auto'}
        ``int8``: after ranks and refit, nodes compute in 8 bits where they can, by
        `onnxruntime.quantization`; their weights are stored so, too. Needs `data`, whose samples
        give the ranges. ``auto``: only where a latency budget is met with less loss by it.
    storage : {'auto', 'cast', 'qdq'}
        How codes are decoded. ``cast``: by operators that every opset has, from which onnxruntime
        computes the weight when it opens the model. ``auto``: the same, with 4 bits as UINT4 from
        opset 21 on. ``qdq``: 8 bits by DequantizeLinear, what has no such form as with ``auto``.
    rank_multiple : 'auto' or int
        Ranks are multiples of it. ``auto``: every rank under a budget of memory alone, else
        those that the CPU computes without waste; see `rank_rule`.
    provider : str, optional
        onnxruntime's execution provider for all runs of the model; the CPU's.
    profile : path, optional
        Measured times are read from this file and added to it, so that the same plan
        comes again. With a latency budget or `measure_latency`.
    measure_latency : bool
        Measure the time of the original and the result for the report; with a latency
        budget that is always done.
    max_drop : float, optional
        Find the smallest model that loses at most this on the samples held back: share of
        agreement with the original's most likely class, of accuracy with `labels`, or
        relative error where there are no classes. Needs data; a budget limits the search.
    plan : Plan, optional
        Apply these decisions instead of solving; a budget that is given still holds.
    seed : int
        For the random inputs of the verification, and the order of samples in distillation.
    threads : int, optional
        Layers or samples that are worked on at a time, and onnxruntime's threads; as many as
        there are cores. The result does not depend on it but for onnxruntime's rounding.
    workers : int, optional
        Processes of our own to which layers and shards of samples are given, in place of
        threads. The result is the same.
    executor : concurrent.futures.Executor, optional
        The same over an executor of yours, which stays open: a process pool, or
        ``dask.distributed.Client(...).get_executor()``.
    dask : str, optional
        The same over the dask cluster whose scheduler has this address.
    cache : path, optional
        A folder that keeps singular values and vectors, second moments and measured losses
        by the content that they come from: another budget on the same model finds them.
    progress : callable, optional
        Called with (stage, done, total).

    Returns
    -------
    Result

    Raises
    ------
    UsageError, ModelError, DataError, BudgetError, VerificationError, WriteError
        See `cobla_onnx.errors`.

    Examples
    --------
    >>> from cobla_onnx import Budget, compress
    >>> result = compress("models/digits.onnx", Budget(mem=0.5))
    >>> result.report.budget["mem"].reached <= 0.5
    True
    """
    own = {"model": model, "budget": budget, "max_drop": max_drop, "plan": plan}
    if budget is not None:
        check_budget(budget)
    if plan is not None and not isinstance(plan, Plan):
        raise UsageError(
            f"{option_name('plan', plan)}: is not a Plan; give e.g. "
            "Plan.from_json(Path('plan.json').read_text())"
        )
    timed = budget is not None and budget.latency is not None
    settings = Settings.of(
        "compress",
        options,
        measure_latency=options.get("measure_latency", False) or timed,
        call=call_text(compress, {**options, **own, "progress": None}),
    )
    if max_drop is not None:
        check_max_drop(max_drop)
        if plan is not None:
            raise UsageError(
                f"{option_name('max_drop')}: chooses ranks, which {option_name('plan')} has; give "
                "one of the two"
            )
    elif budget is None and plan is None:
        budgets = either(
            python="budget=, plan= or max_drop=, e.g. budget=Budget(mem=0.5)",
            command="--mem, --mac or --latency, e.g. --mem 0.5",
        )
        raise UsageError(f"no budget: give {budgets}")
    macs_needed = budget is not None and budget.mac is not None
    if max_drop is not None and timed:
        raise UsageError(
            f"{option_name('max_drop')}: is not combined with {option_name('latency')}; give "
            f"{option_name('mem')} or {option_name('mac')}"
        )
    check_arithmetic(settings, timed, planned=plan is not None)
    asked = () if budget is None or plan is not None else (budget,)
    with open_session(
        model,
        settings,
        macs_needed=macs_needed,
        times_needed=timed and plan is None,
        budgets=asked,
        bits=() if plan is None else plan.bits,
    ) as session:
        if max_drop is not None:
            return session.finish(smallest(session, max_drop, budget))
        return session.compress(budget, plan)
