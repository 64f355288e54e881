"""The column loop over one block as a single Triton kernel.

Rows of a weight are independent once it is known which weights go, and N:M chooses within a row. So each program takes
16 rows through all columns of the block in registers, where the torch loop launches two small kernels for every column.

Shapes: O out features, B columns of a block, K = B rounded up to a power of two, R rows of a program.
"""

import logging
from functools import cache
from subprocess import CalledProcessError

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
except ImportError:  # CPU builds of torch come without it
    triton, TritonError = None, ImportError

ROWS = 16
NOT_HERE = (ImportError, OSError, RuntimeError, CalledProcessError, TritonError)
"""How Triton fails where it is missing, has no C compiler, or the GPU is too old or too small for the kernel."""

log = logging.getLogger(__name__)


@cache
def works(device: torch.device, columns: int, n: int = 0, m: int = 0) -> bool:
    """Tell whether the kernel runs on a device, which is tried once with a few rows of zeros.

    Args:
        device: The device.
        columns: Columns of a block.
        n: For N:M, weights to keep in each group.
        m: For N:M, the size of a group, else 0.

    Returns:
        Whether it runs. If it does not, the log says why.
    """
    w_BO, inverse_BB = torch.zeros(columns, ROWS, device=device), torch.eye(columns, device=device)
    try:
        sweep(w_BO, inverse_BB, torch.zeros_like(w_BO, dtype=torch.bool), inverse_BB[:, :1], n, m)
    except NOT_HERE as error:
        log.warning("the fused GPU kernel cannot be used, the slower torch loop takes over: %s", error)
        return False
    return True


def sweep(
    w_BO: Tensor, inverse_BB: Tensor, pruned_BO: Tensor, importance_B1: Tensor | None = None, n: int = 0, m: int = 0
) -> None:
    """Remove weights of a block and update its later columns, in place.

    Args:
        w_BO: Weights, float32, contiguous; pruned ones end as 0.
        inverse_BB: Inverse of the block of the factor, lower triangular.
        pruned_BO: True = remove. Read, or written where ``m`` is given.
        importance_B1: For N:M, what multiplies the weight in the score.
        n: For N:M, weights to keep in each group.
        m: For N:M, the size of a group; 0 takes the weights that ``pruned_BO`` names.

    Raises:
        ImportError: If Triton is not installed.
    """
    if triton is None:
        raise ImportError("Triton is not installed")
    columns, rows = w_BO.shape
    with torch.cuda.device_of(w_BO):  # Triton launches on the current GPU, which need not be the one of the weight
        _sweep_kernel[(triton.cdiv(rows, ROWS),)](
            w_BO,
            inverse_BB.t().contiguous(),
            inverse_BB.diagonal().reciprocal(),
            pruned_BO.view(torch.uint8),
            w_BO if importance_B1 is None else importance_B1.contiguous(),
            columns,
            rows,
            N=n,
            M=m,
            STEP=max(m, 1),
            K=triton.next_power_of_2(columns),
            R=ROWS,
            num_warps=4,
        )


if triton is not None:

    @triton.jit
    def _sweep_kernel(  # type: ignore[no-untyped-def]
        w_ptr,
        upper_ptr,
        rate_ptr,
        pruned_ptr,
        importance_ptr,
        columns,
        rows,
        N: tl.constexpr,
        M: tl.constexpr,
        STEP: tl.constexpr,
        K: tl.constexpr,
        R: tl.constexpr,
    ):
        row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
        column_K = tl.arange(0, K)
        inside_KR = (column_K[:, None] < columns) & (row_R[None, :] < rows)
        offset_KR = column_K[:, None].to(tl.int64) * rows + row_R[None, :]
        w_KR = tl.load(w_ptr + offset_KR, mask=inside_KR, other=0.0)
        if M > 0:
            importance_K = tl.load(importance_ptr + column_K, mask=column_K < columns, other=0.0)
            pruned_KR = tl.zeros([K, R], dtype=tl.int32)
        else:
            pruned_KR = tl.load(pruned_ptr + offset_KR, mask=inside_KR, other=0).to(tl.int32)
        # The loops stay rolled: 128 unrolled columns take minutes to compile.
        for start in range(0, columns, STEP):
            if M > 0:
                score_KR = tl.abs(w_KR) * importance_K[:, None]
                rank_KR = tl.zeros([K, R], dtype=tl.int32)
                for k in range(start, start + M):
                    other_R = tl.sum(tl.where(column_K[:, None] == k, score_KR, 0.0), axis=0)
                    tie_KR = (other_R[None, :] == score_KR) & (column_K[:, None] > k)
                    rank_KR += ((other_R[None, :] < score_KR) | tie_KR).to(tl.int32)
                in_group_K = (column_K >= start) & (column_K < start + M)
                pruned_KR = tl.where(in_group_K[:, None], (rank_KR < M - N).to(tl.int32), pruned_KR)
            for j in range(start, start + STEP):
                # A sum with one term reads a column out of registers, exactly.
                removed_R = tl.sum(tl.where(column_K[:, None] == j, w_KR * pruned_KR.to(tl.float32), 0.0), axis=0)
                error_R = removed_R * tl.load(rate_ptr + j)
                later_K = (column_K > j) & (column_K < columns)
                coupling_K = tl.load(upper_ptr + j * columns + column_K, mask=later_K, other=0.0)
                w_KR -= coupling_K[:, None] * error_R[None, :]
        tl.store(w_ptr + offset_KR, tl.where(pruned_KR != 0, 0.0, w_KR), mask=inside_KR)
        if M > 0:
            tl.store(pruned_ptr + offset_KR, pruned_KR.to(tl.uint8), mask=inside_KR)
