"""The review of torch's public functions and tensor methods that are *not* on the table of ops, with the
reasons.

`planrt.plans.ir.ops` is an allow-list. Everything that torch itself lists as overridable is either there or
here, and a test fails on names that are in neither: whoever moves to a newer torch decides, name by name, so
that the table never widens in silence. A name goes on the table when it makes sense on a tensor that is
elsewhere: it computes on tensors, numbers and dtypes alone, and returns the same for the same. Names that
only older or newer releases of torch have may stand here too.

The reasons end up in error messages: "Tensor.item cannot run on a remote tensor: <reason>; get() the tensor
...". ``out=`` is a form, not a name: pointers do it as the op and a copy, where it returns one tensor.
"""

from __future__ import annotations

from typing import Final

LEFT_OUT: Final[dict[str, str]] = {
    # A worker's data must not steer or leave a plan by a side door.
    "it reads values into Python: write .get() first": """
        Tensor.__array__ Tensor.__bool__ Tensor.__complex__ Tensor.__contains__ Tensor.__float__
        Tensor.__index__ Tensor.__int__ Tensor.__long__ Tensor.__nonzero__ Tensor.allclose Tensor.equal
        Tensor.is_nonzero Tensor.item Tensor.numpy Tensor.tolist torch.allclose torch.equal
        torch.is_nonzero
    """,
    # Exactly what `planrt.plans.recording.torch_calls` lists, less `size` and `numel`, which plans compute with.
    "it is metadata, answered without the worker": """
        Tensor.__format__ Tensor.__len__ Tensor.__repr__ Tensor._is_view Tensor._version Tensor.device
        Tensor.dim Tensor.dtype Tensor.element_size Tensor.get_device Tensor.grad_fn Tensor.has_names
        Tensor.is_complex Tensor.is_conj Tensor.is_contiguous Tensor.is_cpu Tensor.is_cuda
        Tensor.is_floating_point Tensor.is_inference Tensor.is_ipu Tensor.is_leaf Tensor.is_maia
        Tensor.is_meta Tensor.is_mkldnn Tensor.is_mps Tensor.is_mtia Tensor.is_neg Tensor.is_nested
        Tensor.is_pinned Tensor.is_quantized Tensor.is_same_size Tensor.is_shared Tensor.is_signed
        Tensor.is_sparse Tensor.is_sparse_csr Tensor.is_vulkan Tensor.is_xla Tensor.is_xpu Tensor.itemsize
        Tensor.layout Tensor.name Tensor.names Tensor.nbytes Tensor.ndim Tensor.ndimension Tensor.nelement
        Tensor.output_nr Tensor.requires_grad Tensor.retains_grad Tensor.shape Tensor.storage_offset
        Tensor.stride torch.can_cast torch.get_device torch.is_complex torch.is_conj
        torch.is_floating_point torch.is_inference torch.is_same_size torch.is_signed torch.numel
        torch.promote_types torch.result_type
    """,
    # Layout of memory, lazy negation, and a flag that is always False.
    "it asks for what no pointer keeps of its tensor": """
        Tensor.dim_order Tensor.is_distributed torch.is_distributed torch.is_neg
    """,
    # `Tensor.to` for a device or a type name (a remote tensor stays on its worker's device), `Tensor.unbind`.
    "plans and pointers write another op for it": """
        Tensor.__iter__ Tensor.cpu Tensor.cuda Tensor.type
    """,
    # LAPACK takes pivots as they come.
    "its kernel does not check its arguments, and would use memory that is not its own": """
        linalg.ldl_solve
    """,
    # What plans and pointers do with gradients is in `ops.GRADIENTS`.
    "it is autograd's own: use backward() and .grad, the graph stays on the worker": """
        Tensor._base Tensor._grad Tensor._grad_fn Tensor.grad_dtype
    """,
    "it is about the Python object, and the worker has another": """
        Tensor.__array_wrap__ Tensor.__deepcopy__ Tensor.__reduce_ex__ Tensor.__setstate__
        Tensor._clear_non_serializable_cached_data Tensor.as_subclass Tensor.module_load torch.is_storage
        torch.is_tensor torch.typename
    """,
    # Memory around a tensor may hold what others wrote or freed: also the `as_strided` that copies or scatters.
    # `slice_inverse` is `as_strided` by another name.
    "it reaches raw memory or a storage": """
        Tensor.__cuda_array_interface__ Tensor.__dlpack__ Tensor.__dlpack_device__ Tensor._cdata
        Tensor.as_strided Tensor.as_strided_ Tensor.as_strided_scatter Tensor.const_data_ptr
        Tensor.data_ptr Tensor.is_set_to Tensor.pin_memory Tensor.share_memory_ Tensor.slice_inverse
        Tensor.storage Tensor.storage_type Tensor.untyped_storage torch.as_strided torch.as_strided_
        torch.as_strided_copy torch.as_strided_scatter torch.from_dlpack torch.from_numpy torch.frombuffer
        torch.slice_inverse torch.to_dlpack
    """,
    "its unsafe=True reads out of bounds": "torch.segment_reduce",
    "it can show uninitialised memory": """
        Tensor.new Tensor.resize Tensor.resize_ Tensor.resize_as Tensor.resize_as_ torch.resize_as_
    """,
    "it is about files": "torch.from_file torch.load torch.save",
    # `lobpcg` can besides iterate for ever (niter=-1).
    "it takes a callable, which cannot travel": """
        Tensor._backward_hooks Tensor._post_accumulate_grad_hooks Tensor.apply_ Tensor.map2_ Tensor.map_
        Tensor.register_hook Tensor.register_post_accumulate_grad_hook
        nn.functional.triplet_margin_with_distance_loss torch.compile torch.cond torch.fork torch.lobpcg
        torch.vmap torch.wait torch.while_loop
    """,
    "it reads or changes a setting of the whole process": """
        Tensor._autocast_to_full_precision Tensor._autocast_to_reduced_precision
        torch.are_deterministic_algorithms_enabled torch.autocast torch.autocast_decrement_nesting
        torch.autocast_increment_nesting torch.clear_autocast_cache torch.get_autocast_cpu_dtype
        torch.get_autocast_dtype torch.get_autocast_gpu_dtype torch.get_autocast_ipu_dtype
        torch.get_autocast_xla_dtype torch.get_default_device torch.get_default_dtype
        torch.get_deterministic_debug_mode torch.get_device_module torch.get_float32_matmul_precision
        torch.get_num_interop_threads torch.get_num_threads torch.get_rng_state torch.init_num_threads
        torch.initial_seed torch.is_anomaly_check_nan_enabled torch.is_anomaly_enabled
        torch.is_autocast_cache_enabled torch.is_autocast_cpu_enabled torch.is_autocast_enabled
        torch.is_autocast_ipu_enabled torch.is_autocast_xla_enabled
        torch.is_deterministic_algorithms_warn_only_enabled torch.is_grad_enabled
        torch.is_inference_mode_enabled torch.is_vulkan_available torch.is_warn_always_enabled
        torch.manual_seed torch.read_vitals torch.seed torch.set_anomaly_enabled
        torch.set_autocast_cache_enabled torch.set_autocast_cpu_dtype torch.set_autocast_cpu_enabled
        torch.set_autocast_dtype torch.set_autocast_enabled torch.set_autocast_gpu_dtype
        torch.set_autocast_ipu_dtype torch.set_autocast_ipu_enabled torch.set_autocast_xla_dtype
        torch.set_autocast_xla_enabled torch.set_default_device torch.set_default_dtype
        torch.set_default_tensor_type torch.set_deterministic_debug_mode
        torch.set_float32_matmul_precision torch.set_flush_denormal torch.set_num_interop_threads
        torch.set_num_threads torch.set_printoptions torch.set_rng_state torch.set_vital
        torch.set_warn_always torch.thread_safe_generator torch.use_deterministic_algorithms
        torch.vitals_enabled
    """,
    # What makes them, what asks for their parts, what computes on them.
    "sparse tensors do not travel": """
        Tensor._coalesced_ Tensor._dimI Tensor._dimV Tensor._indices Tensor._nnz
        Tensor._sparse_mask_projection Tensor._to_dense Tensor._values Tensor.ccol_indices Tensor.coalesce
        Tensor.col_indices Tensor.crow_indices Tensor.dense_dim Tensor.indices Tensor.is_coalesced
        Tensor.resize_as_sparse_ Tensor.row_indices Tensor.smm Tensor.sparse_dim Tensor.sparse_mask
        Tensor.sparse_resize_ Tensor.sparse_resize_and_clear_ Tensor.sspaddmm Tensor.to_dense
        Tensor.to_sparse Tensor.to_sparse_bsc Tensor.to_sparse_bsr Tensor.to_sparse_coo
        Tensor.to_sparse_csc Tensor.to_sparse_csr Tensor.values torch.ccol_indices_copy
        torch.col_indices_copy torch.crow_indices_copy torch.hsmm torch.hspmm torch.indices_copy
        torch.native_norm torch.resize_as_sparse_ torch.row_indices_copy torch.saddmm torch.smm
        torch.sparse_bsc_tensor torch.sparse_bsr_tensor torch.sparse_compressed_tensor
        torch.sparse_coo_tensor torch.sparse_csc_tensor torch.sparse_csr_tensor torch.sspaddmm
        torch.values_copy
    """,
    "quantised tensors do not travel": """
        Tensor.dequantize Tensor.int_repr Tensor.q_per_channel_axis Tensor.q_per_channel_scales
        Tensor.q_per_channel_zero_points Tensor.q_scale Tensor.q_zero_point Tensor.qscheme
        torch.choose_qparams_optimized torch.dequantize torch.empty_quantized
        torch.fake_quantize_per_channel_affine torch.fake_quantize_per_tensor_affine
        torch.fbgemm_linear_fp16_weight torch.fbgemm_linear_fp16_weight_fp32_activation
        torch.fbgemm_linear_int8_weight torch.fbgemm_linear_int8_weight_fp32_activation
        torch.fbgemm_linear_quantize_weight torch.fbgemm_pack_gemm_matrix_fp16
        torch.fbgemm_pack_quantized_matrix torch.fused_moving_avg_obs_fake_quant torch.int_repr
        torch.q_per_channel_axis torch.q_per_channel_scales torch.q_per_channel_zero_points torch.q_scale
        torch.q_zero_point torch.quantize_per_channel torch.quantize_per_tensor
        torch.quantize_per_tensor_dynamic torch.quantized_batch_norm torch.quantized_gru
        torch.quantized_gru_cell torch.quantized_lstm torch.quantized_lstm_cell torch.quantized_max_pool1d
        torch.quantized_max_pool2d torch.quantized_max_pool3d torch.quantized_rnn_relu_cell
        torch.quantized_rnn_tanh_cell
    """,
    "nested tensors do not travel": """
        Tensor._nested_tensor_size Tensor._nested_tensor_storage_offsets Tensor._nested_tensor_strides
        Tensor.to_padded_tensor
    """,
    # Older torch only.
    "names of dimensions do not travel": """
        Tensor._update_names Tensor.align_as Tensor.align_to Tensor.refine_names Tensor.rename
        Tensor.rename_ torch.align_tensors
    """,
    # A data owner cannot follow these; scaled and grouped products are such kernels too.
    "it is one vendor's kernel or hardware": """
        Tensor.ipu Tensor.mtia Tensor.record_stream Tensor.to_mkldnn Tensor.xpu nn.functional.grouped_mm
        nn.functional.scaled_grouped_mm nn.functional.scaled_mm torch.batch_norm_backward_elemt
        torch.batch_norm_backward_reduce torch.batch_norm_elemt torch.batch_norm_gather_stats
        torch.batch_norm_gather_stats_with_counts torch.batch_norm_stats torch.batch_norm_update_stats
        torch.cudnn_affine_grid_generator torch.cudnn_batch_norm torch.cudnn_convolution
        torch.cudnn_convolution_add_relu torch.cudnn_convolution_relu torch.cudnn_convolution_transpose
        torch.cudnn_grid_sampler torch.cudnn_is_acceptable torch.miopen_batch_norm
        torch.miopen_convolution torch.miopen_convolution_add_relu torch.miopen_convolution_relu
        torch.miopen_convolution_transpose torch.miopen_ctc_loss torch.miopen_depthwise_convolution
        torch.miopen_rnn torch.mkldnn_adaptive_avg_pool2d torch.mkldnn_convolution
        torch.mkldnn_linear_backward_weights torch.mkldnn_max_pool2d torch.mkldnn_max_pool3d
        torch.mkldnn_rnn_layer
    """,
    # They come without the checks of that function, or change running statistics unmarked.
    "it is the kernel behind a function without native_ or renorm_ in its name": """
        nn.functional.native_channel_shuffle torch.embedding_renorm_ torch.native_batch_norm
        torch.native_channel_shuffle torch.native_dropout torch.native_group_norm torch.native_layer_norm
    """,
    "its views are unknown to autograd: use chunk or split": """
        Tensor.unsafe_chunk Tensor.unsafe_split Tensor.unsafe_split_with_sizes torch.unsafe_chunk
        torch.unsafe_split torch.unsafe_split_with_sizes
    """,
    # `torch.linalg`, `nn.functional.interpolate`, `nn.init.normal_`, ... are on the table, or made of what is.
    "it is deprecated or gone from torch, which names what to use instead": """
        Tensor.cholesky Tensor.eig Tensor.lstsq Tensor.lu Tensor.qr Tensor.reinforce Tensor.solve
        Tensor.symeig Tensor.triangular_solve Tensor.volatile nn.functional.upsample
        nn.functional.upsample_bilinear nn.functional.upsample_nearest nn.init.constant nn.init.dirac
        nn.init.eye nn.init.kaiming_normal nn.init.kaiming_uniform nn.init.normal nn.init.orthogonal
        nn.init.sparse nn.init.uniform nn.init.xavier_normal nn.init.xavier_uniform torch.chain_matmul
        torch.eig torch.frobenius_norm torch.lstsq torch.lu torch.matrix_rank torch.nuclear_norm torch.qr
        torch.range torch.solve torch.symeig torch.triangular_solve
    """,
    # Seen as those ops, by a recorder and by pointers alike.
    "torch makes it of ops that are on the table": "nn.functional.sigmoid nn.functional.tanh",
    "it gives uint64, which does not travel": "Tensor.hash_tensor torch.hash_tensor",
    "it is for tracing with symbolic sizes": """
        nn.functional._sym_int torch._sym_sqrt torch.sym_constrain_range
        torch.sym_constrain_range_for_size torch.sym_float torch.sym_fresh_size torch.sym_int
        torch.sym_ite torch.sym_max torch.sym_min torch.sym_not torch.sym_sqrt torch.sym_sum
    """,
    "it belongs to TorchScript": """
        torch.import_ir_module torch.import_ir_module_from_buffer torch.merge_type_from_type_comment
        torch.parse_ir torch.parse_schema torch.parse_type_comment torch.unify_type_list
    """,
    # `Tensor.index` takes the dimension objects of functorch.
    "it is a helper in Python, not an op on tensors": """
        Tensor.index nn.functional.assert_int_or_pair nn.functional.boolean_dispatch
        nn.functional.handle_torch_function nn.functional.has_torch_function
        nn.functional.has_torch_function_unary nn.functional.has_torch_function_variadic
        nn.init.calculate_gain torch.broadcast_shapes
    """,
}
"""Reason -> the names left out for it, spelled as in `planrt.plans.ir.ops`."""

_REASONS: Final = {name: reason for reason, names in LEFT_OUT.items() for name in names.split()}


def reason_for(name: str) -> str | None:
    """Returns why `name` is not on the table of ops, in half a sentence; None for a name that nobody left
    out."""
    if name.startswith("functional."):  # where torch defines some of its functions
        name = f"torch.{name.removeprefix('functional.')}"
    return _REASONS.get(name)
