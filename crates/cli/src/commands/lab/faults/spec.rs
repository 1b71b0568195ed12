//! What `--kill`, `--stop` and `--cut` say: who, and when. Parsing and nothing else.
//!
//! Places are numbered as links number them: the sites in their order, then the coordinator.

/// Units of a time, in seconds. Longer ones first: they end in the shorter ones.
const TIME_UNITS: [(&str, f64); 3] = [("min", 60.0), ("ms", 1e-3), ("s", 1.0)];

/// Latest time of a fault: a day.
const SECONDS_MAX: f64 = 86_400.0;

/// Between places that both do not hear each other any more, and between one that is not heard and one that does not hear.
const BOTH_WAYS: char = '-';
const ONE_WAY: char = '>';

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum What {
    /// A process ends by SIGKILL and is started again.
    Kill(usize),
    /// A process is stopped by SIGSTOP and goes on.
    Stop(usize),
    /// What the first sends does not reach the second, and the other way round where both are cut off.
    Cut {
        /// From.
        from: usize,
        /// To.
        to: usize,
        /// Whether it is the same the other way round.
        both: bool,
    },
}

/// A fault, and from when to when, in seconds since the first round began.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in super::super) struct Fault {
    /// What.
    pub(in super::super) what: What,
    /// When it begins.
    pub(in super::super) from: f64,
    /// When it is mended: then a process that was killed is started again.
    pub(in super::super) to: f64,
}

/// The places of a lab.
#[derive(Debug, Clone)]
pub(super) struct Names(Vec<String>);

impl Names {
    pub(super) fn new(sites: &[String], coordinator: &str) -> Self {
        Self(sites.iter().map(String::as_str).chain([coordinator]).map(str::to_owned).collect())
    }

    fn of(&self, place: usize) -> &str {
        self.0.get(place).map_or("?", String::as_str)
    }

    /// By the whole name, or by what follows `site-`.
    fn place(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|known| known == name || known.strip_prefix("site-") == Some(name))
    }

    fn known(&self, name: &str) -> Result<usize, String> {
        self.place(name).ok_or_else(|| format!("there is no '{name}'; this lab has {}", self.0.join(", ")))
    }

    /// `site-b@20s`
    pub(super) fn kill(&self, text: &str, pause: f64) -> Result<Fault, String> {
        let (who, when) = text.split_once('@').ok_or("WHO@TIME is expected, as in site-b@20s")?;
        let what = What::Kill(self.known(who)?);
        let from = time(when)?;
        Ok(Fault { what, from, to: from + pause })
    }

    /// `site-b@20s..30s`
    pub(super) fn stop(&self, text: &str) -> Result<Fault, String> {
        let (who, when) = text.split_once('@').ok_or("WHO@FROM..TO is expected, as in site-b@20s..50s")?;
        let what = What::Stop(self.known(who)?);
        let (from, to) = span(when)?;
        Ok(Fault { what, from, to })
    }

    /// `a-b@30s..45s`, `site-a>coordinator@1min..2min`
    pub(super) fn cut(&self, text: &str) -> Result<Fault, String> {
        let expected = "A-B@FROM..TO is expected, as in a-b@30s..45s";
        let (places, when) = text.split_once('@').ok_or(expected)?;
        let (from, to, both) = self.pair(places)?;
        if from == to {
            return Err("there is no link from a place to itself".to_owned());
        }
        let what = What::Cut { from, to, both };
        let (from, to) = span(when)?;
        Ok(Fault { what, from, to })
    }

    /// Names have hyphens of their own: whichever one stands between two places that exist.
    fn pair(&self, text: &str) -> Result<(usize, usize, bool), String> {
        let separators = text.char_indices().filter(|(_, c)| [BOTH_WAYS, ONE_WAY].contains(c));
        let mut pairs = separators.filter_map(|(at, separator)| {
            let (one, other) = (self.place(&text[..at])?, self.place(&text[at + 1..])?);
            Some((one, other, separator == BOTH_WAYS))
        });
        let unknown = || format!("'{text}' is not A-B or A>B of {}", self.0.join(", "));
        pairs.next().ok_or_else(unknown)
    }

    /// For people.
    pub(super) fn describe(&self, fault: &Fault) -> String {
        let Fault { what, from, to } = fault;
        match *what {
            What::Kill(place) => format!("kill {}@{from}s", self.of(place)),
            What::Stop(place) => format!("stop {}@{from}s..{to}s", self.of(place)),
            What::Cut { from: one, to: other, both } => {
                let separator = if both { BOTH_WAYS } else { ONE_WAY };
                format!("cut {}{separator}{}@{from}s..{to}s", self.of(one), self.of(other))
            }
        }
    }
}

/// `30s..45s`
fn span(text: &str) -> Result<(f64, f64), String> {
    let (from, to) = text.split_once("..").ok_or_else(|| format!("'{text}' is not FROM..TO, as in 30s..45s"))?;
    let (from, to) = (time(from)?, time(to)?);
    if from < to { Ok((from, to)) } else { Err(format!("'{text}' ends before it begins")) }
}

fn time(text: &str) -> Result<f64, String> {
    let seconds = parse_seconds(text).filter(|seconds| *seconds <= SECONDS_MAX);
    seconds.ok_or_else(|| format!("'{text}' is not a time up to a day, as in 20s, 500ms or 2min"))
}

/// A number of digits with one of [`TIME_UNITS`].
pub(super) fn parse_seconds(text: &str) -> Option<f64> {
    let (number, factor) =
        TIME_UNITS.iter().find_map(|(unit, factor)| Some((text.trim().strip_suffix(unit)?, *factor)))?;
    // Digits and points only: no sign, no exponent, no infinity.
    let plain = !number.is_empty() && number.chars().all(|c| c.is_ascii_digit() || c == '.');
    Some(number.parse::<f64>().ok().filter(|_| plain)? * factor)
}
