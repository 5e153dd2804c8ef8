//! Bandwidths: learned per pair, inherited from the prefill, the fleet and the table.
#![forbid(unsafe_code)]

use super::super::model::{PAIR_HALF_LIFE_S, PREFILL_HALF_LIFE_S};
use super::{Board, Prefill};

/// How often a row of learned bandwidths is worked out again only because time passed, and how many rows at one decision:
/// what fades within a minute need not make one decision in a second slow.
const ROW_AGE_MAX_S: f64 = 1.0;
const AGED_ROWS_MAX: usize = 4;

impl Board {
    /// Nominal bandwidth between two slots, in bytes per second.
    pub(super) fn nominal(&self, prefill: usize, decode: usize) -> f64 {
        let (p, d) = (&self.prefills[prefill], &self.decodes[decode]);
        let own = p.facts.bytes_per_s.min(d.facts.bytes_per_s);
        match self.settings.cross_zone_bytes_per_s {
            // Zone 0 is no zone: nothing is known of where it stands.
            Some(limit) if p.zone != d.zone && p.zone != 0 && d.zone != 0 => own.min(limit),
            _ => own,
        }
    }

    /// Learns a pair's bandwidth: for itself, its prefill and the fleet.
    pub(super) fn learn_rate(&mut self, prefill: usize, decode: usize, bytes_per_s: f64, now: f64) {
        let factor = bytes_per_s / self.nominal(prefill, decode);
        let state = &mut self.prefills[prefill];
        state.links[decode].rate.observe(bytes_per_s, now);
        state.factor.observe(factor, now);
        state.row_at = None;
        let before = self.fleet.factor.value();
        self.fleet.factor.observe(factor, now);
        let moved = match (before, self.fleet.factor.value()) {
            (Some(before), Some(after)) => (after / before - 1.0).abs() > 0.02,
            _ => true,
        };
        if moved {
            self.forget_rows();
        }
    }

    pub(super) fn forget_rows(&mut self) {
        for prefill in &mut self.prefills {
            prefill.row_at = None;
        }
    }

    /// Works out what a decision needs of the rows that are out of date.
    pub(super) fn refresh_rows(&mut self, now: f64) {
        let mut aged = 0;
        for slot in 0..self.prefills.len() {
            let old = match self.prefills[slot].row_at {
                None => true,
                Some(at) => {
                    let old = aged < AGED_ROWS_MAX && now - at > ROW_AGE_MAX_S;
                    aged += usize::from(old);
                    old
                }
            };
            if old {
                self.refresh_row(slot, now);
            }
        }
    }

    /// Works out a prefill's bandwidths: pair → prefill → fleet → nominal.
    pub(super) fn refresh_row(&mut self, slot: usize, now: f64) {
        let fleet = self.fleet.factor.value().unwrap_or(1.0);
        let factor = self.prefills[slot]
            .factor
            .or(fleet, now, PREFILL_HALF_LIFE_S);
        let mut row = std::mem::take(&mut self.prefills[slot].seconds_per_byte);
        row.clear();
        row.extend((0..self.decodes.len()).map(|decode| {
            let inherited = self.nominal(slot, decode) * factor;
            let rate = &self.prefills[slot].links[decode].rate;
            1.0 / rate.or(inherited, now, PAIR_HALF_LIFE_S)
        }));
        let prefill = &mut self.prefills[slot];
        prefill.fastest = row.iter().copied().fold(f64::INFINITY, f64::min);
        prefill.seconds_per_byte = row;
        prefill.row_at = Some(now);
        prefill.weigh_backlog();
    }
}

impl Prefill {
    /// Turns the pictured bytes of its links into seconds.
    fn weigh_backlog(&mut self) {
        // The ranks of one worker send side by side.
        let ranks = f64::from(self.facts.dp_size);
        for (slot, seconds) in &mut self.busy {
            let link = &self.links[*slot];
            let bytes = link.bytes_queued.saturating_add(link.bytes_in_flight) as f64;
            *seconds = bytes * self.seconds_per_byte[*slot] / ranks;
        }
    }
}
