//! What CUDA needs beside a GPU: NVRTC compiles the kernels when they are first used, and they include CUDA's headers.
//!
//! All of them are looked for before the first kernel. Autotuning takes a kernel that does not compile for one that does not
//! suit, so that a missing header would show as nothing but a slow run.

use super::accelerator::Description;
use std::path::Path;

/// Headers that kernels include, each with the Python package that brings it: arithmetic in 16 bits, tensor cores, and barriers
/// for copies in the background.
const HEADERS: [(&str, &str); 3] =
    [("cuda_fp16.h", "nvidia-cuda-runtime"), ("crt/mma.h", "nvidia-cuda-crt"), ("nv/target", "nvidia-cuda-cccl")];

/// CUDA 13 keeps its C++ library here; CubeCL searches both folders.
const LIBRARY_FOLDER: &str = "cccl";

/// # Errors
/// A header is missing: which one, and how it comes here.
pub(super) fn describe() -> Result<Description, String> {
    // CubeCL's own search: `CUDA_PATH`, then the usual places.
    let Some(folder) = cubecl::cuda::install::cuda_path() else {
        return Err(
            "CUDA's headers are nowhere: install its toolkit, or set CUDA_PATH (docs/engine.md, CUDA)".to_owned()
        );
    };
    let include = folder.join("include");
    if let Some((header, package)) = missing_header(&include) {
        return Err(format!(
            "CUDA's header {header} is not in {}: set CUDA_PATH to a toolkit, or install the Python package {package} there \
             (docs/engine.md, CUDA)",
            include.display()
        ));
    }
    Ok(Description { maker: "NVIDIA".to_owned(), driver: driver(), ..Description::default() })
}

fn missing_header(include: &Path) -> Option<(&'static str, &'static str)> {
    let folders = [include.to_owned(), include.join(LIBRARY_FOLDER)];
    HEADERS.into_iter().find(|(header, _)| !folders.iter().any(|folder| folder.join(header).exists()))
}

/// As the kernel module tells it; empty where it does not.
fn driver() -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let is_version = |word: &&str| word.contains('.') && word.starts_with(|first: char| first.is_ascii_digit());
    text.split_whitespace().find(is_version).map_or(String::new(), |version| format!("NVIDIA {version}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn headers_are_found_in_the_folders_of_both_cuda_12_and_13() {
        for library in ["", LIBRARY_FOLDER] {
            let folder = std::env::temp_dir().join(format!("beringia-cuda-{library}-{}", std::process::id()));
            let files = ["cuda_fp16.h".to_owned(), "crt/mma.h".to_owned(), format!("{library}/nv/target")];
            for (count, file) in files.iter().enumerate() {
                assert_eq!(missing_header(&folder), Some(HEADERS[count]));
                let path = folder.join(file.trim_start_matches('/'));
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "").unwrap();
            }
            assert_eq!(missing_header(&folder), None);
            fs::remove_dir_all(folder).unwrap();
        }
    }
}
