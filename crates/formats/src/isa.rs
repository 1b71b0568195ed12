//! One source, several instruction sets: a kernel is compiled for each, and the best one that the processor has runs.
//!
//! The build's baseline (SSE2 on x86-64) has neither unsigned comparisons of 32 bits nor a narrowing that codes need;
//! with them the same loops run two to four times as fast. The kernels hold plain Rust that the compiler vectorises; no
//! result depends on the choice, for Rust never contracts or reorders floating-point operations. Tests run every kernel
//! on every instruction set that the processor has.

/// An instruction set that this processor has: only [`Isa::best`] and [`Isa::available`] make one, after asking it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// What the build was compiled for.
    Baseline,
    /// x86-64-v3 without FMA: Intel from 2013, AMD from 2015.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// x86-64-v4: Intel servers from 2017, AMD from 2022.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest one. The standard library remembers the answer: this costs a load and a branch.
    pub(crate) fn best() -> Self {
        #[cfg(test)]
        if let Some(chosen) = tests::CHOSEN.get() {
            return chosen;
        }
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512() {
                return Self(Level::Avx512);
            }
            if has_avx2() {
                return Self(Level::Avx2);
            }
        }
        Self(Level::Baseline)
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    has_avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// Defines a kernel: `fn name<E: Bound>(isa, arguments...) -> Output`, compiled once for each [`Level`].
///
/// What the body calls must be `#[inline(always)]`, or it is compiled for the baseline.
macro_rules! vectorised {
    (
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident $(<$($parameter:ident: $bound:path),+>)? (
            $($argument:ident: $type:ty),* $(,)?
        ) $(-> $output:ty)? $body:block
    ) => {
        $(#[$meta])*
        $visibility fn $name $(<$($parameter: $bound),+>)? (isa: $crate::isa::Isa, $($argument: $type),*) $(-> $output)? {
            #[inline(always)]
            fn baseline $(<$($parameter: $bound),+>)? ($($argument: $type),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
            fn avx2 $(<$($parameter: $bound),+>)? ($($argument: $type),*) $(-> $output)? {
                baseline $(::<$($parameter),+>)? ($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$($parameter: $bound),+>)? ($($argument: $type),*) $(-> $output)? {
                baseline $(::<$($parameter),+>)? ($($argument),*)
            }

            match isa.level() {
                // SAFETY: an `Isa` of this level is made only after the processor said that it has every feature named above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Level::Avx512 => unsafe { avx512 $(::<$($parameter),+>)? ($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Level::Avx2 => unsafe { avx2 $(::<$($parameter),+>)? ($($argument),*) },
                $crate::isa::Level::Baseline => baseline $(::<$($parameter),+>)? ($($argument),*),
            }
        }
    };
}

pub(crate) use vectorised;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        /// What [`Isa::best`] answers on this thread.
        pub(super) static CHOSEN: Cell<Option<Isa>> = const { Cell::new(None) };
    }

    fn available() -> Vec<Isa> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Isa(Level::Baseline)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(has_avx2().then_some(Isa(Level::Avx2)));
            all.extend(has_avx512().then_some(Isa(Level::Avx512)));
        }
        all
    }

    /// Asserts that `compute` gives the same on every instruction set of this processor, and returns it.
    pub(crate) fn same_on_all<T: PartialEq + std::fmt::Debug>(compute: impl Fn() -> T) -> T {
        let mut results = available().into_iter().map(|isa| {
            CHOSEN.set(Some(isa));
            (isa, compute())
        });
        let (_, first) = results.next().unwrap();
        for (isa, result) in results {
            assert!(result == first, "{isa:?} differs from the baseline");
        }
        CHOSEN.set(None);
        first
    }
}
