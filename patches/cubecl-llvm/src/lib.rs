//! Stands in for CubeCL's LLVM backend, whose build downloads LLVM from a host that restricted networks do not reach.
//!
//! CubeCL's CUDA and HIP runtimes name this backend's types even where their `cpp` feature has NVRTC or HIPRTC compile every
//! kernel. Here are those names and nothing behind them: compiled modules cannot be made, and who asks for one gets an
//! error that says so. Versions of CubeCL and of this crate go together.

use cubecl_core::ir::amd::GfxArch;
use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_environment::backtrace::BackTrace;
use cubecl_runtime::compiler::CompilationError;
use cubecl_runtime::kernel::BufferIOAttr;
use std::convert::Infallible;
use std::ffi::c_char;

/// Versions of NVIDIA's assembly.
pub mod nvptx {
    /// See the module.
    pub mod ptx_version {
        use std::convert::Infallible;
        use std::fmt;

        /// A version of NVIDIA's assembly: none is emitted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(Infallible);

        impl PtxVersion {
            /// None, for no driver.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl fmt::Display for PtxVersion {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {}
            }
        }
    }
}

/// What the backend can lower.
pub mod shared {
    /// See the module.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;
        use cubecl_core::ir::amd::AmdWmma;

        /// The makers whose GPUs the backend knows.
        pub enum GpuTarget {
            /// NVIDIA.
            Nvptx,
            /// AMD.
            AmdGpu {
                /// Generation of the matrix units.
                wmma: Option<AmdWmma>,
            },
        }

        /// Called where the backend is chosen, which the `cpp` features prevent.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}

/// What to emit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LlvmTarget {
    /// NVIDIA's assembly.
    Nvptx,
    /// AMD's code objects.
    AmdGpu,
}

/// The compiler that is not here.
#[derive(Clone, Debug)]
pub struct PlironCompiler {
    /// What it would emit.
    pub target: LlvmTarget,
}

impl PlironCompiler {
    /// # Errors
    /// Always: this build has no LLVM.
    pub fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        let reason = "this build has no LLVM: enable cubecl's cuda-cpp or hip-cpp feature".to_owned();
        Err(CompilationError::Generic { reason, backtrace: BackTrace::capture() })
    }

    /// Name of the language that it reads.
    pub fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}

/// How to compile.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// AMD's architecture.
    pub arch: Option<GfxArch>,
    /// NVIDIA's architecture.
    pub sm_arch: Option<SmArch>,
    /// Version of NVIDIA's assembly.
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    /// Whether scalars go into the parameters of a kernel.
    pub grid_constants: bool,
    /// So that callers may write `..Default::default()`, as the real options have more fields.
    pub more: (),
}

/// A compiled kernel: there is none.
pub enum PlironArtifact {
    /// For NVIDIA.
    NvptxCode(NvptxModule),
    /// For AMD.
    AmdGpuCode(AmdGpuModule),
}

/// A compiled kernel for NVIDIA: there is none.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// Assembly.
    pub ptx: Vec<c_char>,
    /// Intermediate representation.
    pub ir: String,
    /// Shared memory of a launch.
    pub shared_memory_size: usize,
    /// How buffers are used.
    pub io: Vec<BufferIOAttr>,
    /// Cannot be made.
    pub never: Infallible,
}

/// A compiled kernel for AMD: there is none.
#[derive(Clone, Debug)]
pub struct AmdGpuModule {
    /// Code object.
    pub code_object: Vec<u8>,
    /// Intermediate representation.
    pub ir: String,
    /// Shared memory of a launch.
    pub shared_memory_size: usize,
    /// How buffers are used.
    pub io: Vec<BufferIOAttr>,
    /// Cannot be made.
    pub never: Infallible,
}
