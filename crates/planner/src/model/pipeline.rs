//! Time of a pipeline's step with stages that need not be alike.
//!
//! With m micro-batches, stage times t_i (forward and backward of one micro-batch) and v chunks on each device, 1F1B takes
//! ```text
//! T = m max_i t_i + (sum_i t_i - max_i t_i) / v
//! ```
//! The slowest stage is always busy once it has begun; filling and draining cost the others' time once, divided by the interleaving
//! (arXiv 2104.04473, section 2.2: for equal stages T = m t + (p-1) t / v). Uneven stages show as waiting of all but the slowest.

use crate::units::Seconds;

/// Where a pipeline's time goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PipelineTime {
    /// All of it.
    pub total: Seconds,
    /// What the mean stage waits: filling, draining, and for slower stages.
    pub bubble: Seconds,
}

/// Time of `micro_batches` through stages of these times.
pub fn pipeline(stages: &[Seconds], micro_batches: f64, interleave: f64) -> PipelineTime {
    let sum: Seconds = stages.iter().copied().sum();
    let slowest = stages.iter().copied().fold(Seconds::ZERO, Seconds::max);
    let total = slowest * micro_batches + (sum - slowest) / interleave;
    let busy = sum * micro_batches / (stages.len().max(1) as f64);
    PipelineTime { total, bubble: (total - busy).max(Seconds::ZERO) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_stages_have_the_published_bubble() {
        let time = pipeline(&[Seconds(2.0); 4], 12.0, 1.0);
        assert_eq!((time.total, time.bubble), (Seconds(30.0), Seconds(6.0)));
        assert_eq!(pipeline(&[Seconds(2.0); 4], 12.0, 3.0).total, Seconds(26.0));
        assert_eq!(pipeline(&[Seconds(2.0)], 12.0, 1.0).bubble, Seconds::ZERO);
    }

    #[test]
    fn the_slowest_stage_sets_the_pace() {
        let uneven = pipeline(&[Seconds(1.0), Seconds(3.0)], 10.0, 1.0);
        assert_eq!(uneven.total, Seconds(31.0));
        assert_eq!(uneven.bubble, Seconds(11.0));
    }
}
