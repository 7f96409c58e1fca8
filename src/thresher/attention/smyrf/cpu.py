"""SMYRF on CPUs: kernels rank hash values, attend inside clusters and merge the results."""

from thresher.attention.backends import Implementation
from thresher.attention.contract import Attended
from thresher.attention.prepared import Prepared
from thresher.attention.shared.functional import promote_to_fp32
from thresher.attention.shared.tail import expand_factor
from thresher.attention.smyrf import kernel
from thresher.attention.smyrf.mechanism import Smyrf
from thresher.kernels.calling import choose_sum_dtype, unify_types


class SmyrfOnCpu(Implementation[Smyrf]):
    """The kernel `smyrf`, forward and backward."""

    kernel = "smyrf"

    def explain_refusal(self, mechanism: Smyrf, x: Prepared) -> str | None:
        if x.m <= mechanism.cluster:
            return None  # dense attention, which needs no kernel
        if x.call.pairs is not None or x.call.bias is not None:
            return "it has no masks of pairs and no biases"
        if x.dropout:
            return "it has no dropout of attention weights"
        if mechanism.dedup == "count" and mechanism.rounds > 1:
            return "it does not divide by the number of meetings (dedup=count)"
        return None

    def run(self, mechanism: Smyrf, x: Prepared) -> Attended:
        if x.m <= mechanism.cluster:
            return x.attend_densely()
        q, k, v = (tokens.flatten(0, 1) for tokens in (x.q, x.k, x.v))
        clusters = mechanism.assign(promote_to_fp32(q), promote_to_fp32(k), x, kernel.compute_ranks)
        parts = []
        for part in clusters:
            tiles = part.number if part.tile_cluster is None else part.tile_cluster.shape[1]
            token_q = part.queries.token.unflatten(1, (tiles, -1))
            token_k = part.keys.token.unflatten(1, (part.number, -1))
            tile_cluster = token_q.new_empty(0) if part.tile_cluster is None else part.tile_cluster
            times = mechanism.rounds if part.causal else 1
            parts.append(
                kernel.Part(
                    token_q=token_q,
                    token_k=token_k,
                    tile_cluster=tile_cluster,
                    query_cluster=part.query_cluster,
                    key_cluster=part.key_cluster,
                    causal=part.causal,
                    times=times,
                )
            )
        q, k, v = unify_types(q, k, v)
        factor = expand_factor(mechanism.tail, x, choose_sum_dtype(q))
        out, meetings, repeats = kernel.attend(q, k, v, parts, x.m - x.n, factor)
        return mechanism.finish(x, clusters, out, meetings.float(), (meetings - repeats).float())
