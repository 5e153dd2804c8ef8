//! W3C Trace Context: the `traceparent` header (<https://www.w3.org/TR/trace-context/>, version 00).
#![forbid(unsafe_code)]

use std::fmt;

/// The header's name. `tracestate` beside it belongs to others and passes untouched.
pub const TRACEPARENT: &str = "traceparent";

/// The flag that says that spans are kept.
const SAMPLED: u8 = 1;

/// Identifies a span.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SpanId(pub [u8; 8]);

/// A span among those of one trace, as it travels in a header.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// Identifies the trace; never all zero.
    pub trace: [u8; 16],
    /// Identifies the sender's span; never all zero.
    pub span: SpanId,
    /// Whether spans of this trace are kept.
    pub is_sampled: bool,
}

impl SpanId {
    /// A new one.
    pub fn random() -> Self {
        Self(rand::random::<u64>().max(1).to_be_bytes())
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace, flags) = (u128::from_be_bytes(self.trace), u8::from(self.is_sampled));
        write!(f, "00-{trace:032x}-{:?}-{flags:02x}", self.span)
    }
}

impl TraceContext {
    /// The beginning of a trace of our own, kept with the chance `ratio`.
    pub fn begin(ratio: f64) -> Self {
        let trace = rand::random::<u128>().max(1);
        // As OpenTelemetry's TraceIdRatioBased: routers that see the same trace decide the same.
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "the low 63 bits decide; a share of 2^-52 more or less does not matter"
        )]
        let is_sampled = ((trace as u64 >> 1) as f64) < ratio * (1u64 << 63) as f64;
        Self {
            trace: trace.to_be_bytes(),
            span: SpanId::random(),
            is_sampled,
        }
    }

    /// The same trace, seen from another span.
    pub const fn with_span(self, span: SpanId) -> Self {
        Self { span, ..self }
    }

    /// Reads a header's value; `None` when it is not valid, and a new trace begins.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let is_hex = |part: &str| {
            part.bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        if bytes.len() < 55 || !text.is_ascii() {
            return None;
        }
        let (version, rest) = (&text[..2], &text[55..]);
        let dashes = [2, 35, 52].iter().all(|at| bytes[*at] == b'-');
        // Later versions may add fields behind a dash; version 00 has none.
        let ends_well = match version {
            "00" => rest.is_empty(),
            "ff" => false,
            _ => rest.is_empty() || rest.starts_with('-'),
        };
        let (trace, span, flags) = (&text[3..35], &text[36..52], &text[53..55]);
        if !dashes || !ends_well || ![version, trace, span, flags].into_iter().all(is_hex) {
            return None;
        }
        let trace = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
        let span = u64::from_str_radix(span, 16).ok().filter(|id| *id != 0)?;
        Some(Self {
            trace: trace.to_be_bytes(),
            span: SpanId(span.to_be_bytes()),
            is_sampled: u8::from_str_radix(flags, 16).ok()? & SAMPLED != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn the_standards_example_goes_both_ways() {
        let context = TraceContext::parse(EXAMPLE).unwrap();
        assert!(context.is_sampled);
        assert_eq!(context.to_string(), EXAMPLE);
        let later = EXAMPLE.replace("00-0af", "cc-0af") + "-what-else";
        assert_eq!(TraceContext::parse(&later), Some(context));
    }

    #[test]
    fn what_is_not_valid_begins_anew() {
        for text in [
            "",
            "00",
            &EXAMPLE.to_uppercase(),
            &EXAMPLE.replace("00-0af", "ff-0af"),
            &EXAMPLE.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &EXAMPLE.replace("b7ad6b7169203331", &"0".repeat(16)),
            &EXAMPLE.replace('-', "_"),
            &format!("{EXAMPLE}-more"),
            &EXAMPLE.replace("01", "0g"),
            &"ä".repeat(40),
        ] {
            assert_eq!(TraceContext::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_ratio_is_kept() {
        let kept = |ratio| {
            let begun = (0..4000).map(|_| TraceContext::begin(ratio));
            begun.filter(|context| context.is_sampled).count()
        };
        assert_eq!((kept(0.0), kept(1.0)), (0, 4000));
        assert!((800..1200).contains(&kept(0.25)));
    }
}
