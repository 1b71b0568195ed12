//! Sets of sites and what each can do together: the least time of a step, shares, every way between them, and what it takes.

use super::account::{Account, Usage, account, device_power, rounds};
use super::between::{Judged, Strategy, Wan};
use super::given::settled;
use super::layouts::{Ability, Line, ability, most};
use super::{Group, LeftOut, Links, PlanError, SiteSpec, Task, Wish, figure};
use crate::units::{BytesPerSecond, Seconds, Watts};
use crate::wan::CONTENT;

/// Able sites up to which every set is tried: 2^10 - 1 sets.
const EXHAUSTIVE_MAX: usize = 10;

/// Halvings of the logarithm of a step's time: the last interval is under 1e-13 of it.
const BISECTIONS: usize = 60;

/// A site with its layouts.
pub(super) struct Able<'a, 'b> {
    /// Its place in the list of all sites.
    pub(super) place: usize,
    pub(super) site: &'b SiteSpec<'a>,
    pub(super) ability: Ability<'a>,
}

/// The sites that can hold the model, and why the others cannot.
pub(super) struct AbleSites<'a, 'b> {
    pub(super) able: Vec<Able<'a, 'b>>,
    pub(super) unable: Vec<LeftOut>,
}

/// One member's part of a step.
#[derive(Debug, Clone)]
pub(super) struct Part {
    /// Place among the able sites.
    pub(super) able: usize,
    /// Place of the layout among the site's.
    pub(super) line: usize,
    /// Sequences of a step.
    pub(super) sequences: f64,
}

/// Sites together.
#[derive(Debug, Clone)]
pub(super) struct Team {
    pub(super) parts: Vec<Part>,
    pub(super) step: Seconds,
    /// How much faster a step would be if memory were unbounded.
    pub(super) memory_gain: f64,
}

impl Team {
    /// Places of its members among the able sites.
    pub(super) fn members(&self) -> Vec<usize> {
        self.parts.iter().map(|part| part.able).collect()
    }
}

/// A team with one way between its sites.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    /// Place in [`Candidates::teams`].
    pub(super) team: usize,
    pub(super) judged: Judged,
    /// Time to the loss.
    pub(super) time: Seconds,
    pub(super) account: Account,
}

impl Candidate {
    pub(super) fn figure(&self, objective: super::Objective) -> Option<f64> {
        figure(objective, self.time, &self.account)
    }
}

/// Everything that was tried.
pub(super) struct Candidates {
    pub(super) teams: Vec<Team>,
    pub(super) all: Vec<Candidate>,
}

/// Layouts of every site.
///
/// # Errors
/// No site can, or one cannot although all must take part.
pub(super) fn able<'a, 'b>(
    task: &Task,
    sites: &'b [SiteSpec<'a>],
    wish: &Wish,
) -> Result<AbleSites<'a, 'b>, PlanError> {
    let mut found = AbleSites { able: Vec::new(), unable: Vec::new() };
    let mut refusals = Vec::new();
    for (place, site) in sites.iter().enumerate() {
        match ability(task, site) {
            Ok(ability) => found.able.push(Able { place, site, ability }),
            Err(error @ PlanError::TooFast { .. }) => return Err(error),
            Err(error) if wish.all_sites => return Err(error),
            Err(error) => {
                found.unable.push(LeftOut { name: site.name.clone(), why: error.to_string() });
                refusals.push(error);
            }
        }
    }
    if !found.able.is_empty() {
        return Ok(found);
    }
    // The one that comes nearest to holding it says most.
    let lacking = |error: &PlanError| match error {
        PlanError::DoesNotFit { needed_gib, usable_gib, .. } => needed_gib / usable_gib,
        _ => f64::INFINITY,
    };
    let nearest = refusals.into_iter().min_by(|left, right| lacking(left).total_cmp(&lacking(right)));
    Err(nearest.unwrap_or(PlanError::Sites { found: 0 }))
}

/// Every team that is worth trying with every way.
///
/// # Errors
/// A site gets nothing to do although all must take part, or the run ends before its first merge.
pub(super) fn candidates(
    task: &Task,
    sites: &AbleSites<'_, '_>,
    links: &Links,
    wish: &Wish,
) -> Result<Candidates, PlanError> {
    let able = Field { able: &sites.able, links, wish };
    let mut found = Candidates { teams: Vec::new(), all: Vec::new() };
    gather(task, &able, &mut found);
    if found.teams.is_empty() && wish.all_sites {
        return Err(PlanError::Idle { sequences: task.global_batch });
    }
    if found.all.is_empty() && !found.teams.is_empty() {
        let steps = rounds(task, 1.0, 1.0);
        return Err(PlanError::Short { tokens: task.tokens, steps });
    }
    Ok(found)
}

/// What every team is made of.
struct Field<'a, 'b, 'c> {
    able: &'c [Able<'a, 'b>],
    links: &'c Links,
    wish: &'c Wish,
}

fn gather(task: &Task, field: &Field<'_, '_, '_>, found: &mut Candidates) {
    let able = field.able;
    if field.wish.all_sites {
        let members: Vec<usize> = (0..able.len()).collect();
        add(task, field, &members, found);
    } else if able.len() <= EXHAUSTIVE_MAX {
        for set in 1_u32..1 << able.len() {
            let members: Vec<usize> = (0..able.len()).filter(|place| set & (1 << place) != 0).collect();
            add(task, field, &members, found);
        }
    } else {
        descend(task, field, found);
    }
}

/// From all sites down to one, each time without the one whose leaving costs least.
fn descend(task: &Task, field: &Field<'_, '_, '_>, found: &mut Candidates) {
    let mut members: Vec<usize> = (0..field.able.len()).collect();
    add(task, field, &members, found);
    while members.len() > 1 {
        let without = |left: usize| members.iter().copied().filter(|member| *member != left).collect::<Vec<_>>();
        let smaller = members.iter().map(|left| {
            let rest = without(*left);
            let time = add(task, field, &rest, found);
            (time.unwrap_or(f64::INFINITY), rest)
        });
        let best = smaller.reduce(|best, next| if next.0 < best.0 { next } else { best });
        members = best.map_or_else(Vec::new, |(_, rest)| rest);
    }
}

/// Tries one team; its least time to the loss.
fn add(task: &Task, field: &Field<'_, '_, '_>, members: &[usize], found: &mut Candidates) -> Option<f64> {
    let Field { able, links, wish } = *field;
    let team = team(task, able, members)?;
    let wan = wan(able, links, members);
    let powers: Vec<Vec<(Option<Watts>, f64)>> =
        team.parts.iter().map(|part| powers(&able[part.able], part.line)).collect();
    let mut least = f64::INFINITY;
    let ways = settled(task, &wish.given, members.len(), team.step, wan);
    for judged in ways.into_iter().filter(|judged| merges(task, judged)) {
        let speed = f64::from(task.global_batch) * task.shape.seq / team.step.0 * judged.round.utilisation;
        let time = Seconds(task.tokens * judged.loss.tokens / speed);
        let sum = team.parts.iter().zip(&powers).fold(Account::NONE, |sum, (part, powers)| {
            sum.and(site_account(task, &able[part.able], powers, &judged, time))
        });
        least = least.min(time.0);
        found.all.push(Candidate { team: found.teams.len(), judged, time, account: sum });
    }
    found.teams.push(team);
    Some(least)
}

/// Whether a run lasts for one round: of a longer one nothing would ever be merged.
fn merges(task: &Task, judged: &Judged) -> bool {
    let steps = f64::from(judged.way.inner_steps);
    judged.way.strategy == Strategy::Synchronous || rounds(task, judged.loss.tokens, steps) >= 1.0
}

/// Power of each kind that a layout takes, with its number.
pub(super) fn powers(able: &Able<'_, '_>, line: usize) -> Vec<(Option<Watts>, f64)> {
    let used = able.ability.lines[line].used();
    let power = |device| device_power(&able.site.tariff, &Group { device, devices: 1 });
    used.into_iter().map(|(device, count)| (power(device), count)).collect()
}

/// What one site's part of a run takes.
pub(super) fn site_account(
    task: &Task,
    able: &Able<'_, '_>,
    powers: &[(Option<Watts>, f64)],
    judged: &Judged,
    time: Seconds,
) -> Account {
    let rounds = rounds(task, judged.loss.tokens, f64::from(judged.way.inner_steps));
    let usage = Usage {
        devices: powers.iter().map(|(_, count)| count).sum(),
        time,
        utilisation: judged.round.utilisation,
        sent: judged.round.sent * rounds,
    };
    account(able.site, powers, usage)
}

/// The least time in which the members finish the batch together; none where one of them gets nothing to do.
fn team(task: &Task, able: &[Able<'_, '_>], members: &[usize]) -> Option<Team> {
    let batch = f64::from(task.global_batch);
    let lines: Vec<&[Line<'_>]> = members.iter().map(|member| &able[*member].ability.lines[..]).collect();
    let step = least_time(&lines, batch)?;
    let unbounded: Vec<&[Line<'_>]> = members.iter().map(|member| &able[*member].ability.unbounded[..]).collect();
    let memory_gain = least_time(&unbounded, batch).map_or(1.0, |unbounded| step / unbounded);
    let parts: Option<Vec<Part>> = members
        .iter()
        .zip(&lines)
        .map(|(member, lines)| {
            let (sequences, best) = most(lines, step);
            let line = lines.iter().position(|line| best.is_some_and(|best| core::ptr::eq(best, line)))?;
            Some(Part { able: *member, line, sequences })
        })
        .collect();
    let mut parts = parts?;
    // Whole micro-batches may finish a little more than the batch: shares are what counts.
    let sum: f64 = parts.iter().map(|part| part.sequences).sum();
    parts.iter_mut().for_each(|part| part.sequences *= batch / sum);
    Some(Team { parts, step, memory_gain })
}

fn least_time(sites: &[&[Line<'_>]], batch: f64) -> Option<Seconds> {
    let finished = |time: f64| sites.iter().map(|lines| most(lines, Seconds(time)).0).sum::<f64>() >= batch;
    let enough = sites.iter().flat_map(|lines| lines.iter().map(|line| line.time_for(batch).0)).reduce(f64::min)?;
    // All members together are at most so many times as fast as one of them.
    let (mut low, mut high) = ((enough * 1e-6).ln(), enough.ln());
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(low, high);
        if finished(middle.exp()) { high = middle } else { low = middle }
    }
    Some(Seconds(high.exp()))
}

/// What the busiest of the members sends and receives: each pair's link carries one site's delta at a time, and a site's own access carries all of its.
fn wan(able: &[Able<'_, '_>], links: &Links, members: &[usize]) -> Wan {
    let others = (members.len() as f64 - 1.0).max(1.0);
    let mut wan = Wan { rate: BytesPerSecond(f64::INFINITY), round_trip: Seconds::ZERO };
    for (index, one) in members.iter().enumerate() {
        if let (Some(access), true) = (able[*one].site.access, members.len() > 1) {
            wan.rate = wan.rate.min(access.bytes_per_second() * CONTENT);
        }
        for other in &members[index + 1..] {
            let Some(link) = links.between(able[*one].place, able[*other].place) else { continue };
            wan.rate = wan.rate.min(link.throughput(link.up.min(link.down)) * others);
            wan.round_trip = wan.round_trip.max(link.round_trip);
        }
    }
    wan
}
