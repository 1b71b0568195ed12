//! Who holds which of the things that a round has announced: deltas, slices of them, or merged parts.
//!
//! In a round of n sites there are up to n^2 such words, and after each of them somebody asks whether everybody holds everything. So a word
//! takes a bit and O(log n) steps, and the answer is a count that is kept ([`Holdings::complete`]): 10,000 sites that hold each other's
//! deltas take 12.5 MB.

use base::SiteId;
use std::collections::BTreeMap;

/// Bits of one word of a row.
const WORD_BITS: usize = u64::BITS as usize;

/// What one site holds: a bit for each thing, by column.
#[derive(Debug, Clone, Default)]
struct Row {
    words: Vec<u64>,
    count: usize,
}

impl Row {
    fn word(&self, index: usize) -> u64 {
        self.words.get(index).copied().unwrap_or(0)
    }

    fn has(&self, column: usize) -> bool {
        self.word(column / WORD_BITS) >> (column % WORD_BITS) & 1 == 1
    }

    /// True where it did not have it.
    fn set(&mut self, column: usize) -> bool {
        if self.has(column) {
            return false;
        }
        let index = column / WORD_BITS;
        if self.words.len() <= index {
            self.words.resize(index + 1, 0);
        }
        self.words[index] |= 1 << (column % WORD_BITS);
        self.count += 1;
        true
    }

    fn clear(&mut self, column: usize) {
        if self.has(column) {
            self.words[column / WORD_BITS] &= !(1 << (column % WORD_BITS));
            self.count -= 1;
        }
    }
}

/// Things, each named by the site that made it, and who holds them.
#[derive(Debug, Clone, Default)]
pub(super) struct Holdings {
    columns: BTreeMap<SiteId, usize>,
    /// Columns ever given; those of what was withdrawn stay empty.
    columns_made: usize,
    rows: BTreeMap<SiteId, Row>,
    /// Rows that have all columns.
    complete: usize,
}

impl Holdings {
    /// There is a new thing to hold. Its maker has it.
    pub(super) fn announce(&mut self, maker: SiteId) {
        if self.columns.contains_key(&maker) {
            return;
        }
        self.columns.insert(maker, self.columns_made);
        self.columns_made += 1;
        // Nobody has the new column yet.
        self.complete = 0;
    }

    /// What that site made is void.
    pub(super) fn withdraw(&mut self, maker: SiteId) {
        let Some(column) = self.columns.remove(&maker) else { return };
        self.rows.values_mut().for_each(|row| row.clear(column));
        let all = self.columns.len();
        self.complete = self.rows.values().filter(|row| row.count == all).count();
    }

    /// `holder` has what `maker` made, if that was announced.
    pub(super) fn hold(&mut self, holder: SiteId, maker: SiteId) {
        let Some(column) = self.columns.get(&maker) else { return };
        let row = self.rows.entry(holder).or_default();
        if row.set(*column) && row.count == self.columns.len() {
            self.complete += 1;
        }
    }

    /// A holder is gone.
    pub(super) fn forget(&mut self, holder: SiteId) {
        if let Some(row) = self.rows.remove(&holder)
            && row.count == self.columns.len()
        {
            self.complete -= 1;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// Who made what there is to hold, ascending.
    pub(super) fn makers(&self) -> impl Iterator<Item = SiteId> + '_ {
        self.columns.keys().copied()
    }

    pub(super) fn holds(&self, holder: SiteId, maker: SiteId) -> bool {
        self.rows.get(&holder).zip(self.columns.get(&maker)).is_some_and(|(row, column)| row.has(*column))
    }

    /// How many things a site holds.
    pub(super) fn count(&self, holder: SiteId) -> usize {
        self.rows.get(&holder).map_or(0, |row| row.count)
    }

    pub(super) fn holds_all(&self, holder: SiteId) -> bool {
        self.count(holder) == self.columns.len()
    }

    /// Sites that hold something, and everything.
    pub(super) fn complete(&self) -> usize {
        self.complete
    }

    /// Whether all of these hold everything: at once where not, for then fewer rows are complete.
    pub(super) fn all_hold_all(&self, holders: &[SiteId]) -> bool {
        self.is_empty() || (self.complete >= holders.len() && holders.iter().all(|holder| self.holds_all(*holder)))
    }

    /// What each of these holds, ascending.
    pub(super) fn held_by_all(&self, holders: &[SiteId]) -> Vec<SiteId> {
        let mut common = vec![u64::MAX; self.columns_made.div_ceil(WORD_BITS)];
        for holder in holders {
            let row = self.rows.get(holder);
            for (index, word) in common.iter_mut().enumerate() {
                *word &= row.map_or(0, |row| row.word(index));
            }
        }
        self.makers_in(&common)
    }

    /// What at most one of these holds, ascending.
    pub(super) fn held_once(&self, holders: &[SiteId]) -> Vec<SiteId> {
        let words = self.columns_made.div_ceil(WORD_BITS);
        let (mut once, mut twice) = (vec![0; words], vec![0; words]);
        for row in holders.iter().filter_map(|holder| self.rows.get(holder)) {
            for (index, word) in row.words.iter().enumerate() {
                twice[index] |= once[index] & word;
                once[index] |= word;
            }
        }
        twice.iter_mut().for_each(|word: &mut u64| *word = !*word);
        self.makers_in(&twice)
    }

    fn makers_in(&self, words: &[u64]) -> Vec<SiteId> {
        let is_in = |column: usize| words[column / WORD_BITS] >> (column % WORD_BITS) & 1 == 1;
        self.columns.iter().filter(|(_, column)| is_in(**column)).map(|(maker, _)| *maker).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The same as sets.
    #[derive(Default)]
    struct Sets {
        made: BTreeSet<SiteId>,
        held: BTreeMap<SiteId, BTreeSet<SiteId>>,
    }

    impl Sets {
        fn holds_all(&self, holder: SiteId) -> bool {
            self.made.iter().all(|maker| self.held.get(&holder).is_some_and(|held| held.contains(maker)))
        }
    }

    proptest! {
        /// Whatever is announced, held, withdrawn and forgotten: bits and counts say what sets say.
        #[test]
        fn bits_are_sets(words in prop::collection::vec((0u8..8, 0u32..80, 0u32..80), 0..300)) {
            let (mut holdings, mut sets) = (Holdings::default(), Sets::default());
            for (word, site, other) in words {
                let (site, other) = (SiteId(site), SiteId(other));
                match word {
                    0 | 1 => {
                        holdings.announce(site);
                        sets.made.insert(site);
                    }
                    2 if site.0 % 4 == 0 => {
                        holdings.withdraw(site);
                        sets.made.remove(&site);
                        sets.held.values_mut().for_each(|held| { held.remove(&site); });
                    }
                    3 if site.0 % 4 == 0 => {
                        holdings.forget(site);
                        sets.held.remove(&site);
                    }
                    _ => {
                        let few = SiteId(site.0 % 5);
                        holdings.hold(few, other);
                        if sets.made.contains(&other) {
                            sets.held.entry(few).or_default().insert(other);
                        }
                    }
                }
            }
            let everybody: Vec<SiteId> = (0..80).map(SiteId).collect();
            let complete = everybody.iter().filter(|site| sets.held.contains_key(site) && sets.holds_all(**site));
            prop_assert!(sets.made.is_empty() || holdings.complete() == complete.count());
            prop_assert_eq!(holdings.makers().collect::<BTreeSet<_>>(), sets.made.clone());
            for holder in &everybody {
                prop_assert_eq!(holdings.holds_all(*holder), sets.holds_all(*holder));
                prop_assert_eq!(holdings.count(*holder), sets.held.get(holder).map_or(0, BTreeSet::len));
            }
            let few = &everybody[..3];
            let holders = |maker: &SiteId| few.iter().filter(|site| holdings.holds(**site, *maker)).count();
            let by = |wanted: &dyn Fn(usize) -> bool| -> Vec<SiteId> {
                sets.made.iter().filter(|maker| wanted(holders(maker))).copied().collect()
            };
            prop_assert_eq!(holdings.held_by_all(few), by(&|holders| holders == 3));
            prop_assert_eq!(holdings.held_once(few), by(&|holders| holders <= 1));
            prop_assert_eq!(holdings.all_hold_all(few), few.iter().all(|site| sets.holds_all(*site)));
        }
    }
}
