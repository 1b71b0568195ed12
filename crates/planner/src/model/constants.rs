//! The fitted constants of the performance model: all of them, with unit, meaning, and the range in which the fit may move them.
//!
//! `cargo xtask fit <folder of measured tables>` makes the values again: it minimises the mean absolute log
//! error of step time over one half of the rows (those whose hash is even), each table with equal weight, and reports the errors
//! of the other half. None of them belongs to a table: those that belong to a family of devices say why.

/// Name, unit and range of one constant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Description {
    /// The field's name.
    pub name: &'static str,
    /// Its unit; "1" is a plain number.
    pub unit: &'static str,
    /// Least value that has a meaning.
    pub least: f64,
    /// Greatest value that has a meaning.
    pub greatest: f64,
}

macro_rules! constants {
    ($($(#[doc = $documentation:literal])+ $name:ident = $value:literal, $unit:literal, $least:literal, $greatest:literal;)+) => {
        /// What the model cannot know from makers' figures.
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub struct Constants {
            $($(#[doc = $documentation])+ pub $name: f64,)+
        }

        /// The constants that the program ships with.
        pub const FITTED: Constants = Constants { $($name: $value,)+ };

        /// One line for each field, in order.
        pub const DESCRIPTIONS: &[Description] =
            &[$(Description { name: stringify!($name), unit: $unit, least: $least, greatest: $greatest },)+];

        impl Constants {
            /// The values, in the order of [`DESCRIPTIONS`].
            pub fn to_values(self) -> Vec<f64> {
                vec![$(self.$name,)+]
            }

            /// From values in the order of [`DESCRIPTIONS`]; missing ones keep the shipped value.
            pub fn from_values(values: &[f64]) -> Self {
                let mut values = values.iter().copied();
                Self { $($name: values.next().unwrap_or(FITTED.$name),)+ }
            }
        }
    };
}

constants! {
    /// Sustained matrix-product rate over peak, before the traffic of its operands: A100 and its relatives. A family's value because
    /// clocks under the power limit, and how well the maker's library fills the units, are properties of the chip.
    gemm_fraction_ampere = 0.8377, "1", 0.4, 0.97;
    /// The same for H100 and its relatives, whose matrix units lower the clock under load.
    gemm_fraction_hopper = 0.7574, "1", 0.3, 0.95;
    /// The same for FP8 on Hopper, quantisation of the operands included.
    gemm_fraction_hopper_fp8 = 0.549, "1", 0.2, 0.95;
    /// The same for cards made for graphics.
    gemm_fraction_graphics = 0.1090, "1", 0.1, 0.95;
    /// Sustained rate over a benchmark's rate, for devices of which a measured matrix product is known.
    gemm_fraction_of_benchmark = 0.8796, "1", 0.5, 1.0;
    /// Share of operand traffic that a matrix product does not hide.
    gemm_exposed_traffic = 0.1736, "1", 0.0, 4.0;
    /// Rate of attention's batched products with a head size that is no multiple of 8, over the aligned rate.
    misaligned_head_rate = 0.04706, "1", 0.02, 1.0;
    /// Rate of fused attention over peak on Ampere and other devices.
    attention_fraction = 0.3217, "1", 0.1, 0.9;
    /// The same on Hopper as plain modules call it: kernels of 2022 that do not use its asynchronous units, positions as a bias. What stacks of
    /// fused kernels reach is published (`rates.rs`).
    attention_fraction_hopper = 0.1824, "1", 0.1, 0.9;
    /// Memory traffic of unfused attention between its two products (scale, mask, softmax, dropout), forward.
    unfused_bytes_per_score = 13.44, "byte", 4.0, 60.0;
    /// Memory traffic of norms, activations, residuals and dropout over what their operands' sizes give.
    elementwise_traffic = 0.2146, "1", 0.2, 5.0;
    /// The same where scale, mask, softmax and dropout are a kernel each, the softmax in f32.
    eager_bytes_per_score = 56.81, "byte", 4.0, 120.0;
    /// How much more memory traffic the other small operations of plain modules cause than the fused kernels of Megatron-LM.
    eager_traffic = 10.58, "1", 1.0, 12.0;
    /// Bandwidth of a collective over the scale-up link's one-way rate.
    scale_up_fraction = 0.5591, "1", 0.2, 1.0;
    /// Bandwidth of a collective between nodes over the network's rate.
    network_fraction = 0.7094, "1", 0.1, 1.0;
    /// Bandwidth of a collective over PCIe without peer-to-peer, through the host's memory, over the slot's one-way rate.
    pcie_fraction = 0.09719, "1", 0.01, 1.0;
    /// Time of a collective inside a node before its first byte.
    collective_latency_microseconds = 45.70, "us", 1.0, 100.0;
    /// Share of sharded-data communication that computation can hide, where the stack overlaps it.
    overlap_data = 0.7602, "1", 0.0, 1.0;
    /// Share of tensor-parallel communication that stays exposed where the stack overlaps it with computation.
    overlapped_tensor_exposed = 0.0484, "1", 0.0, 1.0;
    /// Time in which the host starts the kernels of one layer, forward.
    launch_microseconds_per_layer = 990.9, "us", 50.0, 5000.0;
    /// Layers whose start the device waits for after each pipeline transfer, where the host synchronises with it: the host has then lost
    /// its lead.
    transfer_stall_layers = 0.3820, "1", 0.001, 10.0;
    /// Time of the host's part over that of launching alone, where it waits for the end of each kernel.
    blocking_launch_factor = 4.235, "1", 1.0, 6.0;
    /// Once a step, on many nodes: loss scale, norm of gradients, data, logging, whose results every host waits for.
    step_overhead_seconds = 0.1062, "s", 0.0, 2.0;
    /// What waiting for the slowest adds, for each doubling of scale-up domains.
    jitter_per_doubling = 0.01601, "1", 0.0, 0.1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_values_lie_in_their_ranges() {
        for (value, description) in FITTED.to_values().iter().zip(DESCRIPTIONS) {
            assert!((description.least..=description.greatest).contains(value), "{description:?}: {value}");
        }
    }

    #[test]
    fn values_survive_the_way_there_and_back() {
        assert_eq!(Constants::from_values(&FITTED.to_values()), FITTED);
    }
}
