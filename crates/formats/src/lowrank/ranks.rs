//! How many directions each matrix of a fragment gets, of a number of bytes that all share.
//!
//! A direction of matrix j costs c_j bytes, one column of P and one row of Q, and takes s² of the energy, the squared length of its row
//! of W. Bytes go where they take most: to the largest s² / c_j of all, one after another. What the encoding before has
//! found stands for what this one will: its directions change slowly, for what it left over comes again. The directions that it had not
//! are guessed to fall as the ones before them do.
//!
//! Ranks move by a few each time, since a guess is good for a few, and a new direction has to be found.

/// Directions that a matrix gains at most from one encoding to the next, and loses.
const GAINED_MAX: usize = 2;
const LOST_MAX: usize = 3;

/// What every matrix keeps: without a direction nobody would know what another one is worth. Two, for a slope.
const RANK_MIN: usize = 2;

/// Smallest and largest quotient of one guessed s² and the one before.
const FALL: std::ops::RangeInclusive<f64> = 0.05..=0.98;

/// What one matrix had, and may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand<'a> {
    /// c: bytes of one column and one row.
    pub(super) direction_bytes: usize,
    /// s² of the directions that it had, the largest first.
    pub(super) squares: &'a [f64],
    /// The largest rank that it may have.
    pub(super) rank_max: usize,
}

impl Demand<'_> {
    /// Energy for each byte of direction `index`.
    fn worth(&self, index: usize) -> f64 {
        let had = self.squares.len();
        let square = match self.squares.get(index) {
            Some(square) => *square,
            None => self.squares[had - 1] * self.fall().powi((index + 1 - had) as i32),
        };
        square / self.direction_bytes as f64
    }

    /// The mean quotient of neighbours in the weaker half.
    fn fall(&self) -> f64 {
        let last = self.squares.len() - 1;
        let first = last / 2;
        if first == last || self.squares[first] <= 0.0 {
            return *FALL.end();
        }
        let quotient = (self.squares[last] / self.squares[first]).powf(1.0 / (last - first) as f64);
        quotient.clamp(*FALL.start(), *FALL.end())
    }

    fn least(&self) -> usize {
        let had = self.squares.len();
        had.saturating_sub(LOST_MAX).max(RANK_MIN.min(had))
    }

    fn most(&self) -> usize {
        (self.squares.len() + GAINED_MAX).min(self.rank_max)
    }
}

/// The rank of each matrix. All together they take at most `bytes`, if those that they had do; every matrix had at least one direction.
pub(super) fn share_out(demands: &[Demand<'_>], bytes: usize) -> Vec<usize> {
    let mut ranks: Vec<usize> = demands.iter().map(Demand::least).collect();
    let mut left = bytes.saturating_sub(demands.iter().zip(&ranks).map(|(of, rank)| of.direction_bytes * rank).sum());
    loop {
        let fits = |(of, rank): &(&Demand<'_>, &usize)| **rank < of.most() && of.direction_bytes <= left;
        let candidates = demands.iter().zip(&ranks).enumerate().filter(|(_, candidate)| fits(candidate));
        let worths = candidates.map(|(index, (of, rank))| (index, of.worth(*rank)));
        // The first of equals: the same everywhere. What is not a number is above all, and is refused by every decoder anyway.
        let Some((best, _)) = worths.reduce(|best, next| if next.1.total_cmp(&best.1).is_gt() { next } else { best })
        else {
            return ranks;
        };
        ranks[best] += 1;
        left -= demands[best].direction_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(direction_bytes: usize, squares: &[f64]) -> Demand<'_> {
        Demand { direction_bytes, squares, rank_max: 255 }
    }

    #[test]
    fn bytes_go_where_they_take_most() {
        let (flat, steep) = ([9.0, 8.0, 7.0, 6.0, 5.0], [9.0, 3.0, 1.0, 0.3, 0.1]);
        assert_eq!(share_out(&[demand(10, &flat), demand(10, &steep)], 100), [7, 3]);
        assert_eq!(share_out(&[demand(10, &steep), demand(10, &flat)], 100), [3, 7]);
        // At a tenth of the price the steep one keeps its third direction before the flat one has its own: 1.0 / 10 and 7.0 / 100.
        assert_eq!(share_out(&[demand(100, &flat), demand(10, &steep)], 230), [2, 3]);
        assert_eq!(share_out(&[demand(100, &flat), demand(10, &steep)], 550), [5, 5]);
        assert_eq!(share_out(&[demand(10, &flat)], 50), [5], "one alone has all");
        assert_eq!(share_out(&[demand(10, &flat)], 49), [4]);
        assert_eq!(share_out(&[], 10), [0; 0]);
    }

    #[test]
    fn every_matrix_keeps_some_and_none_has_more_than_it_may() {
        let zeros = [0.0; 4];
        let strong = [1e9; 4];
        let bound = Demand { rank_max: 5, ..demand(1, &strong) };
        assert_eq!(share_out(&[demand(1, &zeros), bound], 8), [3, 5]);
        assert_eq!(share_out(&[demand(1, &zeros), demand(1, &strong)], 8), [2, 6]);
        assert_eq!(share_out(&[demand(1, &[0.0]), demand(1, &[1.0])], 2), [1, 1], "of one none can go");
    }

    #[test]
    fn never_more_bytes_than_there_are() {
        for seed in 0..200_u64 {
            let random = |index: u64| crate::round::Key::new(seed, index as u32).random(0) as usize;
            let spectra: Vec<Vec<f64>> = (0..6)
                .map(|matrix| {
                    let mut squares: Vec<f64> =
                        (0..1 + random(matrix) % 9).map(|k| random(100 * matrix + k as u64) as f64).collect();
                    squares.sort_by(|a, b| b.total_cmp(a));
                    squares
                })
                .collect();
            let demands: Vec<_> = spectra.iter().map(|squares| demand(1 + squares.len() * 7 % 5, squares)).collect();
            let bytes = demands.iter().map(|of| of.direction_bytes * of.squares.len()).sum();
            let ranks = share_out(&demands, bytes);
            let taken: usize = demands.iter().zip(&ranks).map(|(of, rank)| of.direction_bytes * rank).sum();
            assert!(taken <= bytes, "seed {seed}: {ranks:?} take {taken} of {bytes}");
            assert!(ranks.iter().all(|rank| *rank > 0), "seed {seed}: {ranks:?}");
        }
    }
}
